"""Optimisers, averages of parameters, micro-batches and low-rank factors."""
