"""Trained models in use: loading, conditions, sampling, pictures on disk."""
