"""Resizing as in OpenCV, Pillow and MATLAB, with which the data of other models were made.

OpenCV doesn't antialias (except with "area"), Pillow and MATLAB do. The methods of OpenCV and
MATLAB are implemented as a matrix for the rows and another for the columns.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from PIL import Image

from latent_diffusion.core.types import lookup
from latent_diffusion.nets.resize import keys_kernel

Matrix = Callable[[int, int], np.ndarray]  # (old, new) -> [new old]


def _lanczos4(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 4, np.sinc(x) * np.sinc(x / 4), 0.0)


def _kernel(
    old: int,
    new: int,
    kernel: Callable,
    reach: float | int,
    widen: float = 1.0,
    mirror: bool = False,
) -> np.ndarray:
    """The matrix [new old] of a kernel around half-pixel centres.

    reach: half of the kernel's support. widen: factor for its width. mirror: reflect the picture
    at the border instead of repeating the outermost pixel.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    reach = reach * widen
    first = np.floor(centre - reach).astype(int)
    matrix, rows = np.zeros((new, old)), np.arange(new)
    for offset in range(int(np.ceil(2 * reach)) + 2):
        place = first + offset
        weight = kernel((centre - place) / widen) / widen
        if mirror:
            place = place % (2 * old)
            place = np.where(place < old, place, 2 * old - 1 - place)
        np.add.at(matrix, (rows, np.clip(place, 0, old - 1)), weight)
    return matrix / matrix.sum(1, keepdims=True)


def _nearest(old: int, new: int) -> np.ndarray:
    return np.eye(old)[np.arange(new) * old // new]


_linear = partial(_kernel, kernel=lambda x: np.maximum(1 - np.abs(x), 0), reach=1)


def _area(old: int, new: int) -> np.ndarray:
    """The mean over the area of a new pixel; for enlarging, linear interpolation as in OpenCV."""
    if new >= old:
        return _linear(old, new)
    edges = np.arange(new + 1) * old / new
    low, high = edges[:-1, None], edges[1:, None]
    covered = np.minimum(high, np.arange(old) + 1) - np.maximum(low, np.arange(old))
    return np.maximum(covered, 0) * new / old


def _matlab(old: int, new: int) -> np.ndarray:
    """MATLAB's imresize: Keys' cubic kernel with a = −1/2, widened when shrinking, mirrored."""
    return _kernel(old, new, lambda x: keys_kernel(x, -0.5), 2, max(old / new, 1.0), mirror=True)


MATRICES: dict[str, Matrix] = {
    "cv_nearest": _nearest,
    "cv_bilinear": _linear,
    "cv_bicubic": partial(_kernel, kernel=keys_kernel, reach=2),
    "cv_area": _area,
    "cv_lanczos": partial(_kernel, kernel=_lanczos4, reach=4),
    "matlab_bicubic": _matlab,
}
PILLOW = {
    "pil_nearest": Image.Resampling.NEAREST,
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "pil_box": Image.Resampling.BOX,
    "pil_hamming": Image.Resampling.HAMMING,
    "pil_lanczos": Image.Resampling.LANCZOS,
}


def resample(
    image: Float[np.ndarray, "H W C"], height: int, width: int, name: str
) -> Float[np.ndarray, "h w C"]:
    """Resize levels in [0, 1], and clip the result to [0, 1]. name: in MATRICES or PILLOW."""
    out: np.ndarray
    if name in PILLOW:
        channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(image, -1, 0)]
        resized = [np.asarray(c.resize((width, height), PILLOW[name])) for c in channels]
        out = np.stack(resized, -1)
    else:
        matrix = lookup({**MATRICES, **dict.fromkeys(PILLOW)}, name, "resampling")
        rows, columns = matrix(image.shape[0], height), matrix(image.shape[1], width)
        out = np.einsum("ih,hwc,jw->ijc", rows, image, columns, optimize=True)
    return np.clip(out, 0.0, 1.0).astype(np.float32)
