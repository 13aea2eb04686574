"""From an example as stored to an example as trained on: NumPy in, NumPy out.

All randomness comes from the generator that is passed in, which the pipeline derives from the
seed and the example's position, so that a batch is a pure function of (seed, step).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from latent_diffusion.data.conditions import make_conditions
from latent_diffusion.data.contract import KEYS
from latent_diffusion.data.layout import WHOLE
from latent_diffusion.data.sources import Example
from latent_diffusion.data.windows import CROPS, cut, cut_labels, window
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


def make_transform(
    data_config: Any, train: bool, tokenizer: Tokenizer | None = None
) -> Callable[..., Example]:
    """Return `transform(example, rng=None)`: crop, resize, flip and scale; keep batch keys only.

    Label maps and boxes follow the picture. From it are made, where `data_config` names them,
    `low_res`, `mask` and `layout`; with a tokenizer, `tokens` [L] from `caption`.

    In evaluation (`train` false) nothing is cropped or flipped at random, and of several captions
    the first is taken; masks and degradations come from the generator there, too.
    """
    crop = "center" if data_config.crop == "random" and not train else data_config.crop
    lookup(CROPS, crop, "data.crop")
    size = data_config.image_size
    conditions = make_conditions(data_config, train)

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
        where, flip, image = None, False, example.get("image")
        if image is not None:
            where = window(image.shape[:2], size, crop, data_config.shorter_side, rng)
            flip = data_config.flip and train and rng.random() < 0.5
            image = _flipped(cut(image, where, size), flip)
            out["image"] = to_float(image)
        if "segmentation" in example:
            out["segmentation"] = _flipped(cut_labels(out["segmentation"], where, size), flip)
        made = conditions(example, image, WHOLE if where is None else where.crop, flip, rng)
        out |= {k: to_float(v) if v.dtype == np.uint8 else v for k, v in made.items()}
        if tokenizer is not None:
            out["tokens"] = tokens_of(example, rng)
        return out

    return transform


def _flipped(image: np.ndarray, flip: bool) -> np.ndarray:
    return image[:, ::-1] if flip else image
