"""Similarity of two pictures, by pixels and by windows: PSNR and SSIM."""

import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float

WINDOW = 11  # pixels
SIGMA = 1.5
MIN_MSE = 1e-10  # equal images: 106 dB rather than infinity


def psnr(x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio in dB of every pair, for images in [-1, 1] (not clipped here)."""
    mse = jnp.mean(jnp.square(x - y), (1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(mse, MIN_MSE))  # the range is 2


def ssim(x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Structural similarity of every pair in [-1, 1] (Wang et al. 2004): the mean over windows.

    Windows are Gaussian, 11 pixels wide and wholly inside. Moments are population moments.
    Raises ValueError for images smaller than a window.
    """
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels a side, got {x.shape[1]}x{x.shape[2]}")
    c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c_1) / (mean_x**2 + mean_y**2 + c_1)
    structure = (2 * covariance + c_2) / (var_x + var_y + c_2)
    return jnp.mean(luminance * structure, (1, 2, 3))


def _blur(x: Array) -> Array:
    """Means over windows, at all positions where they lie wholly inside."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    h, w = (n - WINDOW + 1 for n in x.shape[1:3])
    x = sum(weight * x[:, i : i + h] for i, weight in enumerate(weights))
    return sum(weight * x[:, :, j : j + w] for j, weight in enumerate(weights))
