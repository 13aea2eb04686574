"""OpenMoji on canvases of three shapes: square, twice as wide, twice as high.

The drawing lies in the middle. Square crops of the pictures therefore cut most drawings, and the
picture's original size shows which drawings aren't cut.
"""

import hashlib
from typing import Any

import numpy as np

from latent_diffusion.data import openmoji_source
from latent_diffusion.data.sources import Example, Remember

CANVASES = ((0, 0), (0, 1), (1, 0))  # additions to height and width, in sides of the drawing


class OpenMojiWide:
    """Square pictures of another source on white canvases, whose shapes depend on the `name`."""

    def __init__(self, source: Any):
        self.source, self.class_names = source, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def captions(self) -> list[str]:
        """All captions, in order."""
        captions: list[str] = self.source.captions()
        return captions

    def __getitem__(self, index: int) -> Example:
        example = {key: value for key, value in self.source[index].items() if key != "alpha"}
        half = len(example["image"]) // 2
        digest = hashlib.sha256(example["name"].encode()).digest()
        added = [(half * n, half * n) for n in (*CANVASES[digest[0] % len(CANVASES)], 0)]
        return {**example, "image": np.pad(example["image"], added, constant_values=255)}


def make(data_config: Any, split: str) -> Remember:
    """The pictures of `openmoji_source` on their canvases; the drawings keep their size."""
    return Remember(OpenMojiWide(openmoji_source.of_styles(data_config, split, ["openmoji"])))
