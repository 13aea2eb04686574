"""Random masks for inpainting, as in LaMa (Suvorov et al. 2022; the paper's App. E.2.2).

The holes are one to five polylines of up to 105 pixels' width, or one to four boxes with sides of
30 to 150 pixels. These sizes are for 256×256 pixels and scale with the picture.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from latent_diffusion.core.types import lookup

REFERENCE = 256  # side of the picture, in pixels, for which the sizes are


def strokes(size: int, rng: np.random.Generator) -> Float[np.ndarray, "S S 1"]:
    """One to five polylines of one to five thick segments, which turn left and right by turns."""
    image = Image.new("L", (size, size))
    pen, scale = ImageDraw.Draw(image), size / REFERENCE
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0, size, 2)
        for segment in range(rng.integers(1, 6)):
            angle = rng.uniform(0.01, 4.0) * (1 if segment % 2 else -1)
            length = rng.uniform(10, 210) * scale
            width = rng.uniform(5, 105) * scale
            end_x = min(max(x + length * np.sin(angle), 0), size)
            end_y = min(max(y + length * np.cos(angle), 0), size)
            pen.line((x, y, end_x, end_y), fill=255, width=max(1, round(width)))
            r = width / 2
            pen.ellipse((end_x - r, end_y - r, end_x + r, end_y + r), fill=255)
            x, y = end_x, end_y
    return _as_mask(image)


def boxes(size: int, rng: np.random.Generator) -> Float[np.ndarray, "S S 1"]:
    """One to four boxes that don't touch the border."""
    image = Image.new("L", (size, size))
    pen, scale = ImageDraw.Draw(image), size / REFERENCE
    margin = 10 * scale
    for _ in range(rng.integers(1, 5)):
        sides = np.maximum(rng.uniform(30, 150, 2) * scale, 1)
        left, top = rng.uniform(margin, size - margin - sides)
        pen.rectangle((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=255)
    return _as_mask(image)


def mixed(size: int, rng: np.random.Generator) -> Float[np.ndarray, "S S 1"]:
    """Strokes or boxes, each with probability 1/2."""
    return (strokes if rng.random() < 0.5 else boxes)(size, rng)


def mixed_or_all(size: int, rng: np.random.Generator) -> Float[np.ndarray, "S S 1"]:
    """`mixed`, or the whole picture with probability 1/4, as for Stable Diffusion's inpainting."""
    whole = np.ones((size, size, 1), np.float32)
    return whole if rng.random() < 0.25 else mixed(size, rng)


def at_most_half(size: int, rng: np.random.Generator) -> Float[np.ndarray, "S S 1"]:
    """`mixed`, drawn again until the holes are at most a half, as in LaMa's evaluation sets."""
    while (mask := mixed(size, rng)).mean() > 0.5:
        pass
    return mask


MASKS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "lama": mixed,
    "lama_or_all": mixed_or_all,
    "lama_half": at_most_half,
    "strokes": strokes,
    "boxes": boxes,
}


def draw_mask(name: str, size: int, rng: np.random.Generator) -> Float[np.ndarray, "S S 1"]:
    """Draw a mask of size × size pixels, 1 in the holes. name: in MASKS."""
    return lookup(MASKS, name, "data.mask")(size, rng)


def _as_mask(image: Image.Image) -> np.ndarray:
    return (np.asarray(image)[..., None] > 0).astype(np.float32)
