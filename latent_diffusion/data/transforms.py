"""Transform stored examples into training examples; both are dictionaries of NumPy arrays.

All randomness comes from the generator that is passed in, which the pipeline derives from the
seed and the example's position, so that a batch is a pure function of (seed, step).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from latent_diffusion.core.types import lookup
from latent_diffusion.data.conditions import make_conditions
from latent_diffusion.data.contract import KEYS
from latent_diffusion.data.layout import WHOLE, mirrored
from latent_diffusion.data.sources import Example
from latent_diffusion.data.windows import CROPS, corner, cut, cut_depth, cut_labels, window

_PICTURES = ("image", "segmentation", "mask", "depth")  # keys that are cut and flipped
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


def make_cut(data_config: Any, train: bool) -> Transform:
    """Return `cut_out(example, rng)`, which cuts and resizes `image` and the maps beside it.

    It adds `window` [4], the part of the whole picture that they show: left, top, right, bottom in
    [0, 1]. With `data_config.sizes` it adds `original_size` [2], the height and width of the
    picture before, unless the source has this key. The new size is the example's `size` (height,
    width), or else the square of `data_config.image_size`. An example with a window was cut before
    and stays as it is. Of several `crops`, training takes one at random, evaluation the first.
    """
    crop = "center" if data_config.crop == "random" and not train else data_config.crop
    lookup(CROPS, crop, "data.crop")
    square = (data_config.image_size, data_config.image_size)

    def cut_out(example: Example, rng: np.random.Generator) -> Example:
        if "crops" in example:
            example = dict(example)
            crops = example.pop("crops")
            return {**example, **crops[rng.integers(len(crops)) if train and crops[1:] else 0]}
        if "window" in example:
            return example
        where, example, size = None, dict(example), example.get("size", square)
        if "image" in example:
            shape = example["image"].shape[:2]
            where = window(shape, size, crop, data_config.shorter_side, rng)
            if data_config.get("sizes", False):
                example.setdefault("original_size", np.array(shape))
            example["image"] = cut(example["image"], where, size)
        if "segmentation" in example:
            labels: Any = np.asarray(example["segmentation"], np.int32)
            example["segmentation"] = cut_labels(labels, where, size)
        if "mask" in example:
            example["mask"] = cut_labels(_with_channel(example["mask"]), where, size)
        if "depth" in example:
            example["depth"] = cut_depth(_with_channel(example["depth"]), where, size)
        return {**example, "window": WHOLE if where is None else where.crop}

    return cut_out


def make_transform(
    data_config: Any, train: bool, tokenizer: Tokenizer | None = None, as_bytes: bool = False
) -> Callable[..., Example]:
    """Return `transform(example, rng=None)`: crop, resize, flip and scale; keep batch keys only.

    Maps and boxes in the data are cropped and flipped like the picture. Where `data_config` names
    them, `low_res`, `mask`, `layout` and `crop_top_left` with `target_size` are added; with a
    tokenizer, `tokens` [L] from `caption`. as_bytes: pictures stay levels of 0 ... 255, which take
    a quarter of the memory; a compiled step scales them (`runtime.parallel.compile_step`).

    In evaluation (`train` false) crops and flips aren't random, and the first of several captions
    is taken; masks and degradations are random there, too.
    """
    cut_out = make_cut(data_config, train)
    conditions = make_conditions(data_config, train)
    scaled = (lambda x: x) if as_bytes else to_float

    def tokens_of(example: Example, rng: np.random.Generator) -> np.ndarray:
        if "caption" not in example:
            raise ValueError(
                f"no caption to tokenize; the example has: {', '.join(example)} "
                "(docs/own_pictures.md says where a folder's captions may stand)"
            )
        caption = example["caption"]
        if not isinstance(caption, str):
            caption = caption[rng.integers(len(caption)) if train else 0] if caption else ""
        return tokenizer([caption])[0]  # type: ignore[misc]

    def transform(example: Example, rng: np.random.Generator | None = None) -> Example:
        rng = rng if rng is not None else np.random.default_rng(0)
        example = dict(cut_out(example, rng))
        mirrors = example.pop("mirrors", [{}])
        turns = ("image" in example or len(mirrors) == 2) and data_config.flip and train
        flip = turns and rng.random() < 0.5
        example |= mirrors[-1] if flip else mirrors[0]
        turned = {k: _flipped(example[k], flip) for k in _PICTURES if k in example}
        image = turned.pop("image", None)
        out: Example = {k: np.asarray(v, KEYS[k].dtype) for k, v in example.items() if k in KEYS}
        out |= turned
        if data_config.get("sizes", False):
            crop, size = example["window"], example.get("size", (data_config.image_size,) * 2)
            seen = corner(mirrored(crop) if flip else crop, size)
            out["crop_top_left"] = np.array(seen, np.int32)
            out["target_size"] = np.array(size, np.int32)
        else:
            out.pop("original_size", None)  # some sources have it for a part of their examples
        if image is not None:
            out["image"] = scaled(image)
        made = conditions(example, image, example["window"], flip, rng)
        out |= {k: scaled(v) if v.dtype == np.uint8 else v for k, v in made.items()}
        if tokenizer is not None:
            out["tokens"] = tokens_of(example, rng)
        return out

    return transform


def _with_channel(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.float32).reshape(*levels.shape[:2], 1)


def _flipped(image: np.ndarray, flip: bool) -> np.ndarray:
    return image[:, ::-1] if flip else image
