"""Experiments: `configs/default.py` has every field; the others change some of its values."""
