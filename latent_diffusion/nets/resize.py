"""Resizing as in released networks, from which `jax.image.resize` differs."""

import functools

import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float


def keys_kernel(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic kernel (1981). a: −3/4 in torch and OpenCV; −1/2 in his paper and MATLAB."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=32)
def cubic(old: int, new: int, align_corners: bool = False) -> np.ndarray:
    """The matrix [new old] of torch's bicubic interpolation: no antialiasing, borders repeated.

    align_corners: first and last samples meet, instead of the edges of the first and last pixels.
    """
    if align_corners:
        centre = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        centre = (np.arange(new) + 0.5) * old / new - 0.5
    first, matrix = np.floor(centre).astype(int), np.zeros((new, old))
    for place in (first - 1, first, first + 1, first + 2):
        weight = keys_kernel(centre - place)
        np.add.at(matrix, (np.arange(new), np.clip(place, 0, old - 1)), weight)
    return matrix.astype(np.float32)


def bicubic(
    x: Float[Array, "B H W C"], height: int, width: int, align_corners: bool = False
) -> Float[Array, "B h w C"]:
    """Bicubic interpolation, not antialiased; x itself if it has the size."""
    if x.shape[1:3] == (height, width):
        return x
    rows = jnp.asarray(cubic(x.shape[1], height, align_corners))
    columns = jnp.asarray(cubic(x.shape[2], width, align_corners))
    return jnp.einsum("hH,wW,bHWc->bhwc", rows, columns, x)
