"""Benchmarks: `python -m benchmarks` (or `make bench`), and one program for each other question.

Read the modules of the first in this order: `reference` (the networks and inputs), `ours` and
`pytorch` (the same calls on both sides), `measure` (two processes that take turns), `__main__`
(the table).
"""
