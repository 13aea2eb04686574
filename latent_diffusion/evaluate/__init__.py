"""Measuring trained models."""

SAMPLING = ("sampler", "num_steps", "guidance_scale")  # the sampling options that scores depend on
