"""Resizing as others' networks were trained with, where `jax.image.resize` differs."""

import functools

import jax.numpy as jnp
import numpy as np

from latent_diffusion.types import Array, Float

_A = -0.75  # of Keys' cubic kernel (1981), as torch has it; Keys' own and Pillow's is −0.5


@functools.lru_cache(maxsize=32)
def _cubic_weights(size: int, wanted: int) -> np.ndarray:
    """[wanted size]: first and last samples meet, no antialiasing, borders repeated."""
    place = np.arange(wanted) * ((size - 1) / max(wanted - 1, 1))
    first = np.floor(place).astype(int)
    weights = np.zeros((wanted, size))
    for offset in (-1, 0, 1, 2):
        d = np.abs(place - (first + offset))
        near = ((_A + 2) * d - (_A + 3)) * d * d + 1
        far = ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
        column = np.clip(first + offset, 0, size - 1)
        np.add.at(weights, (np.arange(wanted), column), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def bicubic_aligned(x: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B h w C"]:
    """Bicubic interpolation with aligned corners, not antialiased."""
    rows = jnp.asarray(_cubic_weights(x.shape[1], height))
    columns = jnp.asarray(_cubic_weights(x.shape[2], width))
    return jnp.einsum("hH,wW,bHWc->bhwc", rows, columns, x)
