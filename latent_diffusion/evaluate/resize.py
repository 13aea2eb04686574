"""Resizing as in the reference evaluations, by a matrix for the rows and one for the columns.

Feature nets need images of a fixed size, and scores depend on the filter that resizes them (Parmar
et al., CVPR 2022). So the filter is part of a metric's definition.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float, lookup
from latent_diffusion.nets.resize import keys_kernel


def _bicubic(old: int, new: int) -> np.ndarray:
    """Pillow's bicubic filter: Keys' cubic with a = -1/2, wider by the scale when shrinking."""
    scale = old / new
    width = max(scale, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * scale
    # Pillow takes the pixels whose centres lie within the support, cut to whole pixels.
    position = np.arange(old)[None]
    first = np.maximum(np.floor(centre - 2 * width + 0.5), 0)
    last = np.minimum(np.floor(centre + 2 * width + 0.5), old)
    x = (position + 0.5 - centre) / width
    weights = np.where((position >= first) & (position < last), keys_kernel(x, a=-0.5), 0.0)
    return weights / weights.sum(1, keepdims=True)


def _interpolate(source: np.ndarray, old: int) -> np.ndarray:
    """Linear interpolation at positions `source`; those outside get the pixel at the border."""
    source = np.clip(source, 0, old - 1)
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, old - 1)
    weights = np.zeros((len(source), old))
    rows = np.arange(len(source))
    np.add.at(weights, (rows, low), 1 - (source - low))
    np.add.at(weights, (rows, high), source - low)
    return weights


def _bilinear(old: int, new: int) -> np.ndarray:
    """Bilinear with half-pixel centres and no antialiasing, as in pytorch-fid."""
    return _interpolate((np.arange(new) + 0.5) * old / new - 0.5, old)


def _tensorflow(old: int, new: int) -> np.ndarray:
    """TensorFlow 1's bilinear: pixel 0 onto pixel 0, as in the original FID and torch-fidelity."""
    return _interpolate(np.arange(new) * (old / new), old)


FILTERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "bicubic": _bicubic,  # clean-fid's
    "bilinear": _bilinear,
    "tensorflow": _tensorflow,
}


def resize(
    x: Float[Array, "B H W C"], size: int, filter: str = "bicubic"
) -> Float[Array, "B S S C"]:
    """Resize images of levels 0 ... 255 to size × size; levels are clipped, but not rounded.

    filter: a name in `FILTERS`. Images of the right size aren't changed.
    """
    matrix = lookup(FILTERS, filter, "filter")
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(matrix(n, size), jnp.float32) for n in x.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=exact)
    x = jnp.einsum("jw,biwc->bijc", columns, x, precision=exact)
    return jnp.clip(x, 0, 255)
