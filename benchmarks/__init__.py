"""Benchmarks: `python -m benchmarks` (or `make bench`), and two programs on single questions.

A newcomer's way in: `reference` (what is timed), `ours` and `pytorch` (the same calls on both
sides), `measure` (a process for each, taking turns), `__main__` (the table).
"""
