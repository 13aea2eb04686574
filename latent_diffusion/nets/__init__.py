"""Linen modules: arrays in, arrays out; no config objects, no disk, no mesh."""
