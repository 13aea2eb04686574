"""Checkpoints that travel: everybody's latent diffusion weights, read and written."""
