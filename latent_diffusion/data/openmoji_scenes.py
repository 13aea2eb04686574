"""Scenes that are composed of OpenMoji drawings: pictures with boxes and label maps.

Scene i is a pure function of (split, i, image size): two to four of the drawings in `SUBJECTS`,
each at a random place and size, later ones in front. `boxes` [N 4] (left, top, right, bottom, in
shares of the side) enclose the drawings without their transparent margins, `labels` [N] are their
subjects, and `segmentation` is 0 on the ground and 1 + label on a drawing. The drawings' alpha
channels determine boxes and segmentation.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from latent_diffusion.core.types import lookup
from latent_diffusion.data import openmoji
from latent_diffusion.data.sources import Example, Remember

SUBJECTS = (
    "red heart", "red apple", "sun", "deciduous tree", "house", "automobile", "dog face",
    "grinning face", "star", "soccer ball", "mushroom", "fish", "wrapped gift", "key", "umbrella",
    "ice cream",
)  # fmt: skip
GROUNDS = ((255, 255, 255), (222, 240, 255), (226, 245, 220), (250, 240, 214))
NUM_OBJECTS = (2, 4)
SIDES = (0.34, 0.6)  # least and largest side of a drawing, as a share of the scene's side
DRAWN = 96  # the side of the drawings before they are pasted, in pixels
_SPLITS = {"train": (0, 6000), "test": (1, 500)}  # seed, number of scenes


class Placed(NamedTuple):
    """A drawing in a scene: its subject, and the box around its opaque part, in pixels."""

    label: int
    ink: tuple[int, int, int, int]


class OpenMojiScenes:
    """The scenes of a split. drawings: RGBA pictures in the order of the subjects."""

    class_names = SUBJECTS

    def __init__(self, drawings: Sequence[Image.Image], split: str, image_size: int):
        self.drawings = drawings
        self.seed, self._length = lookup(_SPLITS, split, "split of openmoji_scenes")
        self.image_size = image_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        size = self.image_size
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = GROUNDS[rng.integers(len(GROUNDS))]
        segmentation = np.zeros((size, size), np.int32)
        placed: list[Placed] = []
        for label in rng.choice(len(SUBJECTS), rng.integers(*NUM_OBJECTS, endpoint=True), False):
            placed.append(self._paste(canvas, segmentation, int(label), placed, rng))
        labels = [p.label for p in placed]
        return {
            "image": np.round(canvas).astype(np.uint8),
            "segmentation": segmentation,
            "boxes": np.array([p.ink for p in placed], np.float32) / size,
            "labels": np.array(labels, np.int32),
            "caption": ", ".join(SUBJECTS[label] for label in labels),
            "name": f"{index:05d}",
        }

    def _paste(
        self,
        canvas: np.ndarray,
        segmentation: np.ndarray,
        label: int,
        placed: list[Placed],
        rng: np.random.Generator,
    ) -> Placed:
        """Draw one more drawing, at that of twenty random places where it hides least of others."""
        side = max(4, round(rng.uniform(*SIDES) * self.image_size))
        rgba = np.asarray(self.drawings[label].resize((side, side), Image.Resampling.BOX))
        alpha = rgba[..., 3:].astype(np.float32) / 255
        rows, columns = (np.flatnonzero(alpha[..., 0].max(axis) > 0.5) for axis in (1, 0))
        places = []
        for top, left in rng.integers(0, self.image_size - side + 1, (20, 2)):
            right, bottom = int(left + columns[-1] + 1), int(top + rows[-1] + 1)
            ink = (int(left + columns[0]), int(top + rows[0]), right, bottom)
            hidden = sum(_shared(ink, other.ink) for other in placed)
            places.append((hidden, int(top), int(left), ink))
        _, top, left, ink = min(places)
        window = np.s_[top : top + side, left : left + side]
        canvas[window] = alpha * rgba[..., :3] + (1 - alpha) * canvas[window]
        segmentation[window][alpha[..., 0] > 0.5] = 1 + label
        return Placed(label, ink)


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The area of the overlap of two boxes, as a share of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return max(width, 0) * max(height, 0) / min(areas)


@functools.cache
def drawings() -> tuple[Image.Image, ...]:
    """The drawings of the subjects, RGBA. Needs the `openmoji` extra."""
    hexcodes = {emoji.caption: emoji.hexcode for emoji in openmoji.catalogue()}
    missing = [subject for subject in SUBJECTS if subject not in hexcodes]
    if missing:
        raise ValueError(f"openmoji_scenes: no drawing of {', '.join(missing)}")
    return tuple(openmoji.draw(hexcodes[subject], DRAWN) for subject in SUBJECTS)


def make(data_config: Any, split: str) -> Remember:
    """The split "train" or "test" at `data_config.image_size`; nothing is written to disk."""
    return Remember(OpenMojiScenes(drawings(), split, data_config.image_size))
