"""From an example as stored to an example as trained on: NumPy in, NumPy out.

All randomness comes from the generator that is passed in, which the pipeline derives from the
seed and the example's position, so that a batch is a pure function of (seed, step).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from latent_diffusion.data.contract import KEYS
from latent_diffusion.data.sources import Example
from latent_diffusion.types import lookup

Transform = Callable[[Example, np.random.Generator], Example]
Tokenizer = Callable[[list[str]], Int[np.ndarray, "N L"]]


def to_float(image: UInt8[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W C"]:
    """Bytes 0...255 to float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(image: Float[np.ndarray, "... C"]) -> UInt8[np.ndarray, "... C"]:
    """[-1, 1] to bytes, rounded and clipped: the inverse of `to_float`."""
    return np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8)


def on_white(rgba: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """Lay a picture with transparency on a white ground."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def resize(
    image: UInt8[np.ndarray, "H W C"], height: int, width: int
) -> UInt8[np.ndarray, "h w C"]:
    """Pillow's bicubic filter, which widens with the scale and so antialiases when shrinking."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def _center(height: int, width: int, side: int, rng: np.random.Generator) -> tuple[int, int]:
    return (height - side) // 2, (width - side) // 2


def _random(height: int, width: int, side: int, rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))


# Where a square window lies: "none" is no window, the whole picture squashed to a square.
CROPS: dict[str, Callable[[int, int, int, np.random.Generator], tuple[int, int]] | None] = {
    "none": None,
    "center": _center,
    "random": _random,
}


def square(
    image: UInt8[np.ndarray, "H W C"],
    size: int,
    crop: str,
    shorter_side: int,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "S S C"]:
    """A square picture of `size` pixels a side.

    crop: a name in CROPS. shorter_side: pixels; the picture is first resized to it and the window
    has `size` pixels (the paper's OpenImages: 384 and 256). 0: the window is the largest square
    (the paper's other sets), which is then resized.
    """
    place = lookup(CROPS, crop, "data.crop")
    if place is None:
        return resize(image, size, size)
    height, width = image.shape[:2]
    if shorter_side:
        if shorter_side < size:
            raise ValueError(f"data.shorter_side={shorter_side} is below data.image_size={size}")
        scale = shorter_side / min(height, width)
        height, width = round(height * scale), round(width * scale)
        image = resize(image, height, width)
    side = size if shorter_side else min(height, width)
    top, left = place(height, width, side, rng)
    return resize(image[top : top + side, left : left + side], size, size)


def make_transform(
    data_config: Any, train: bool, tokenizer: Tokenizer | None = None
) -> Callable[..., Example]:
    """Return `transform(example, rng=None)`: crop, resize, flip and scale; keep batch keys only.

    In evaluation (`train` false) nothing is random: a random crop becomes a centred one, nothing
    is flipped, and of several captions the first is taken. With a tokenizer, `tokens` [L] is
    made from `caption`.
    """
    crop = "center" if data_config.crop == "random" and not train else data_config.crop
    lookup(CROPS, crop, "data.crop")
    size, flip = data_config.image_size, data_config.flip and train

    def image_of(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = square(image, size, crop, data_config.shorter_side, rng)
        if flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return to_float(image)

    def tokens_of(example: Example, rng: np.random.Generator) -> np.ndarray:
        if "caption" not in example:
            raise ValueError(f"no caption to tokenize; the example has: {', '.join(example)}")
        caption = example["caption"]
        if not isinstance(caption, str):
            caption = caption[rng.integers(len(caption)) if train else 0] if caption else ""
        return tokenizer([caption])[0]  # type: ignore[misc]

    def transform(example: Example, rng: np.random.Generator | None = None) -> Example:
        rng = rng if rng is not None else np.random.default_rng(0)
        out: Example = {k: np.asarray(v, KEYS[k].dtype) for k, v in example.items() if k in KEYS}
        if "image" in example:
            out["image"] = image_of(example["image"], rng)
        if tokenizer is not None:
            out["tokens"] = tokens_of(example, rng)
        return out

    return transform
