"""Coloured shapes with captions ("red circle"): a data set for tests and first runs.

Example i is a pure function of (split, i, image size). Every shape appears in every colour, at a
random place and size, on a white ground.
"""

from typing import Any

import numpy as np

from latent_diffusion.core.types import lookup
from latent_diffusion.data.sources import Example

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 50, 190),
    "black": (30, 30, 30),
}
_SPLITS = {"train": (0, 480), "test": (1, 120)}  # seed, number of examples


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the point (x, y) lies in the shape of half-width 1 around the origin."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85
    if shape == "triangle":
        return (y <= 0.8) & (y >= 2 * abs(x) - 0.9)
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)


class SyntheticSource:
    """The shapes of a split; `class_label` is the shape."""

    class_names = SHAPES

    def __init__(self, split: str, image_size: int):
        self.seed, self._length = lookup(_SPLITS, split, "split of synthetic")
        self.image_size = image_size

    def __len__(self) -> int:
        return self._length

    def captions(self) -> list[str]:
        """All captions, in order."""
        return [self[i]["caption"] for i in range(len(self))]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        label, colour = index % len(SHAPES), index // len(SHAPES) % len(COLOURS)
        name, rgb = list(COLOURS.items())[colour]
        rng = np.random.default_rng([self.seed, index])
        radius = rng.uniform(0.3, 0.42)
        centre = rng.uniform(radius, 1 - radius, 2)
        grid = (np.arange(self.image_size) + 0.5) / self.image_size
        x, y = (grid[None] - centre[0]) / radius, (grid[:, None] - centre[1]) / radius
        inside = _inside(SHAPES[label], *np.broadcast_arrays(x, y))
        image = np.where(inside[..., None], np.array(rgb, np.uint8), np.uint8(255))
        caption = f"{name} {SHAPES[label]}"
        return {"image": image, "caption": caption, "class_label": label, "name": f"{index:05d}"}


def make(data_config: Any, split: str) -> SyntheticSource:
    """The split "train" or "test" at `data_config.image_size`."""
    return SyntheticSource(split, data_config.image_size)
