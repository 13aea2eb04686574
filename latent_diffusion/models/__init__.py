"""Networks with their parameters and their process: the first stage, the denoiser, a classifier."""
