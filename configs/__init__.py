"""Experiments: `configs/default.py` has every field, the others state their difference to it."""
