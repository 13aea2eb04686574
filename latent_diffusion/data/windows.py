"""Choose the part of a picture that an example shows, cut it out and resize it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from latent_diffusion.core.types import lookup
from latent_diffusion.data.layout import Box

Size = tuple[int, int]  # height and width
LARGEST = 2**26  # pixels of a picture that is resized as a whole before it is cut


def resize(
    image: UInt8[np.ndarray, "H W C"], height: int, width: int
) -> UInt8[np.ndarray, "h w C"]:
    """Resize with Pillow's bicubic filter, which antialiases when shrinking."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def fit(
    image: UInt8[np.ndarray, "H W C"], size: tuple[int, int], mask: bool = False
) -> UInt8[np.ndarray, "h w C"]:
    """The largest central part with the aspect ratio of size (height, width), resized to it.

    mask: each pixel takes the nearest value.
    """
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    # Rounding may make the smaller of the two negative, which Pillow refuses.
    top = max(0.0, (image.shape[0] - height / scale) / 2)
    left = max(0.0, (image.shape[1] - width / scale) / 2)
    box = (left, top, image.shape[1] - left, image.shape[0] - top)
    how = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
    whole = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(whole.resize((width, height), how, box)).reshape(height, width, -1)


def _center(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    return height // 2, width // 2


def _random(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(height + 1)), int(rng.integers(width + 1))


# Functions: largest distances of a window from top and left -> its distances. "squash" and "none"
# have no window; "none" requires square pictures.
CROPS: dict[str, Callable[[int, int, np.random.Generator], tuple[int, int]] | None] = {
    "none": None,
    "squash": None,
    "center": _center,
    "random": _random,
}


class Window(NamedTuple):
    """A part of a picture: rows × columns pixels of the picture resized to height × width."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int

    @property
    def crop(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in [0, 1] of the whole picture."""
        left, right = self.left / self.width, (self.left + self.columns) / self.width
        return left, self.top / self.height, right, (self.top + self.rows) / self.height


def window(
    shape: tuple[int, ...], size: Size, crop: str, shorter_side: int, rng: np.random.Generator
) -> Window | None:
    """The window from which a picture of `size` is cut; None for the whole picture.

    shape, size: (height, width). crop: a name in CROPS. shorter_side: in pixels; the picture is
    first resized to it, and the window has exactly `size`, a square (the paper's OpenImages: 384
    and 256). If it is 0, the window is the largest with the aspect ratio of `size` (the paper's
    other data sets) and is resized later.
    """
    place = lookup(CROPS, crop, "data.crop")
    height, width = shape
    if crop == "none" and height != width:
        raise ValueError(
            f"data.crop='none' takes square pictures, but one has {width}×{height} pixels: "
            "'center' and 'random' cut a square out of it, 'squash' changes its shape"
        )
    if place is None:
        return None
    rows, columns = size
    if shorter_side:
        if shorter_side < max(size):
            raise ValueError(f"data.shorter_side={shorter_side} is below data.image_size={rows}")
        scale = shorter_side / min(height, width)
        height, width = round(height * scale), round(width * scale)
    else:
        scale = min(height / rows, width / columns)
        rows, columns = max(1, round(rows * scale)), max(1, round(columns * scale))
    top, left = place(height - rows, width - columns, rng)
    return Window(height, width, top, left, rows, columns)


def corner(crop: Box, size: Size) -> tuple[int, int]:
    """Top and left of a crop, in pixels of the picture resized so that the crop has `size`."""
    left, top, right, bottom = crop
    return round(top / (bottom - top) * size[0]), round(left / (right - left) * size[1])


def cut(
    image: UInt8[np.ndarray, "H W C"], where: Window | None, size: Size
) -> UInt8[np.ndarray, "h w C"]:
    """The picture in the window, resized to `size`."""
    if where is None:
        return resize(image, *size)
    if where.height * where.width > LARGEST:  # only what the window sees
        height, width = image.shape[:2]
        left, top, right, bottom = where.crop
        box = (left * width, top * height, min(right * width, width), min(bottom * height, height))
        seen = (where.columns, where.rows)
        part = Image.fromarray(image).resize(seen, Image.Resampling.BICUBIC, box)
        return resize(np.asarray(part), *size)
    image = resize(image, where.height, where.width)
    rows = slice(where.top, where.top + where.rows)
    return resize(image[rows, where.left : where.left + where.columns], *size)


def cut_labels(
    labels: Num[np.ndarray, "H W *C"], where: Window | None, size: Size
) -> Num[np.ndarray, "h w *C"]:
    """Labels or a mask in the window: like `cut`, but each pixel takes the nearest value."""
    height, width = labels.shape[:2]
    left, top, right, bottom = (0.0, 0.0, 1.0, 1.0) if where is None else where.crop
    at = [(np.arange(side) + 0.5) / side for side in size]
    rows = ((top + at[0] * (bottom - top)) * height).astype(int)
    columns = ((left + at[1] * (right - left)) * width).astype(int)
    return labels[rows][:, columns]


def cut_depth(
    depth: Float[np.ndarray, "H W 1"], where: Window | None, size: Size
) -> Float[np.ndarray, "h w 1"]:
    """The depth map in the window: like `cut`, but in any unit; the map may have another size."""
    height, width = depth.shape[:2]
    left, top, right, bottom = (0.0, 0.0, 1.0, 1.0) if where is None else where.crop
    box = (left * width, top * height, right * width, bottom * height)
    image = Image.fromarray(depth[..., 0].astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box))[..., None]
