"""Objects in boxes as tokens, as in the paper's layout-to-image models (taming-transformers).

An object is three tokens: its class, the top left corner and the bottom right corner of its box.
Classes and places share one vocabulary; the position in the sentence distinguishes them. Places lie
on a square grid over the picture: the released models have 8192 tokens and 90×90 places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float | int, float | int, float | int, float | int]
# left, top, right, bottom; in [0, 1] of the whole picture
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Object(NamedTuple):
    """A class and its box, which has no extent where only the centre is known."""

    label: int
    box: Box


@dataclass(frozen=True)
class LayoutTokens:
    """Conversion between objects and sentences of `length` tokens.

    vocab_size: the last token is "none". max_objects: further objects are left out. encode_crop:
    two tokens at the end are the visible part of the picture, and boxes are relative to the whole
    picture; without it boxes are relative to the visible part. centres: an object is two tokens,
    class and centre.
    """

    vocab_size: int = 8192
    max_objects: int = 30
    encode_crop: bool = True
    centres: bool = False

    @property
    def side(self) -> int:
        """The number of places along each side of the grid."""
        return math.isqrt(self.vocab_size)

    @property
    def none(self) -> int:
        """The token for "no object"."""
        return self.vocab_size - 1

    @property
    def per_object(self) -> int:
        """The number of tokens of an object."""
        return 2 if self.centres else 3

    @property
    def length(self) -> int:
        """The number of tokens of a sentence."""
        return self.per_object * self.max_objects + 2 * self.encode_crop

    def place(self, x: float | int, y: float | int) -> int:
        """The token of a point; for a point outside the picture, that of the nearest inside."""
        last = self.side - 1
        column, row = (round(min(max(v, 0.0), 1.0) * last) for v in (x, y))
        return row * self.side + column

    def point(self, token: int) -> tuple[float, float]:
        """The point of a place, (x, y)."""
        row, column = divmod(int(token), self.side)
        return column / (self.side - 1), row / (self.side - 1)

    def build(
        self,
        objects: Sequence[Object],
        crop: Box = WHOLE,
        rng: np.random.Generator | None = None,
    ) -> Int[np.ndarray, " L"]:
        """The sentence for the objects that the crop shows; with `rng`, in random order.

        Raises ValueError for a class that isn't below "none".
        """
        objects = list(objects)[: self.max_objects]
        if rng is not None:
            objects = [objects[i] for i in rng.permutation(len(objects))]
        tokens: list[int] = []
        for label, box in objects:
            if not 0 <= label < self.none:
                raise ValueError(f"layout: class {label} must lie in [0, {self.none})")
            if overlaps(box, crop):
                box = box if self.encode_crop else inside(box, crop)
                tokens += [label, *self._places(box)]
        tokens += [self.none] * (self.per_object * self.max_objects - len(tokens))
        if self.encode_crop:
            tokens += [self.place(*crop[:2]), self.place(*crop[2:])]
        return np.asarray(tokens, np.int32)

    def inverse(self, tokens: Sequence[int] | np.ndarray) -> tuple[list[Object], Box]:
        """The objects of a sentence, and the crop."""
        tokens, n = [int(t) for t in tokens], self.per_object
        crop: Box = WHOLE
        if self.encode_crop:
            crop = (*self.point(tokens[-2]), *self.point(tokens[-1]))
        objects = []
        for start in range(0, n * self.max_objects, n):
            label, *corners = tokens[start : start + n]
            if label != self.none:
                first, last = self.point(corners[0]), self.point(corners[-1])
                objects.append(Object(label, (*first, *last)))
        return objects, crop

    def _places(self, box: Box) -> list[int]:
        left, top, right, bottom = box
        if self.centres:
            return [self.place((left + right) / 2, (top + bottom) / 2)]
        return [self.place(left, top), self.place(right, bottom)]


def overlaps(box: Box, crop: Box) -> bool:
    """Whether any part of the box lies in the crop."""
    return box[0] < crop[2] and crop[0] < box[2] and box[1] < crop[3] and crop[1] < box[3]


def inside(box: Box, crop: Box) -> Box:
    """The box in the crop's coordinates, cut off at its border."""
    (left, top), (width, height) = crop[:2], (crop[2] - crop[0], crop[3] - crop[1])
    x0, x1 = (min(max((x - left) / width, 0.0), 1.0) for x in (box[0], box[2]))
    y0, y1 = (min(max((y - top) / height, 0.0), 1.0) for y in (box[1], box[3]))
    return x0, y0, x1, y1


def mirrored(box: Box) -> Box:
    """The box after the picture was flipped left to right."""
    return 1 - box[2], box[1], 1 - box[0], box[3]


def attribute_label(
    label: int,
    num_classes: int,
    *,
    group: bool = False,
    occluded: bool = False,
    depiction: bool = False,
    inside: bool = False,
) -> int:
    """A class with its attributes as one number, as in the paper's OpenImages model."""
    marks = group + 2 * occluded + 4 * depiction + 8 * inside
    return label + num_classes * marks


def plot(
    objects: Sequence[Object], size: int, names: Sequence[str] = ()
) -> UInt8[np.ndarray, "S S 3"]:
    """A picture of the boxes with the names (else numbers) of their classes, a colour per class."""
    image = Image.new("RGB", (size, size), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(8, size // 14))
    for label, box in objects:
        hue = label * 137 % 360  # neighbours in number are far apart in colour
        colour = f"hsl({hue}, 70%, 40%)"
        left, top, right, bottom = (v * (size - 1) for v in box)
        pen.rectangle((left, top, right, bottom), outline=colour, width=max(1, size // 64))
        name = names[label] if label < len(names) else str(label)
        pen.text((left + 2, top + 1), name, fill=colour, font=font)
    return np.asarray(image)


def as_objects(boxes: Float[np.ndarray, "N 4"], labels: Int[np.ndarray, " N"]) -> list[Object]:
    """The objects of arrays of boxes and classes; boxes may jut out of the picture.

    Raises ValueError for boxes in pixels, with their corners in another order, or without labels.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes and {len(labels)} labels")
    objects = []
    for label, (left, top, right, bottom) in zip(labels, boxes, strict=True):
        box = float(left), float(top), float(right), float(bottom)
        if not (-1 <= box[0] <= box[2] <= 2 and -1 <= box[1] <= box[3] <= 2):
            raise ValueError(
                f"a box is {box}, expected left, top, right, bottom in shares of the picture"
            )
        objects.append(Object(int(label), box))
    return objects
