"""The contract of batches: the keys, and the dtype, shape and range of their values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Key(NamedTuple):
    """The dtype, shape and range of values that one key of a batch must have."""

    dtype: type
    shape: str
    low: float = -np.inf
    high: float = np.inf


KEYS: dict[str, Key] = {
    "image": Key(np.float32, "B H W 3", -1, 1),
    "moments": Key(np.float32, "B h w c"),  # cached first-stage output
    "codes": Key(np.int32, "B h w", 0),  # cached indices into the first stage's codebook
    "class_label": Key(np.int32, "B", 0),
    "tokens": Key(np.int32, "B L", 0),
    "layout": Key(np.int32, "B L", 0),
    "segmentation": Key(np.int32, "B H W", 0),
    "mask": Key(np.float32, "B H W 1", 0, 1),  # 1 = hole
    "low_res": Key(np.float32, "B h w 3", -1, 1),
    "noise_level": Key(np.int32, "B", 0),  # of low_res
    "depth": Key(np.float32, "B H W 1"),  # in any unit
    "neighbours": Key(np.float32, "B k D"),  # image embeddings of similar pictures
    "image_embedding": Key(np.float32, "B D"),
    # In pixels, height or top first (see `nets.conditioners.sizes`):
    "original_size": Key(np.int32, "B 2", 1),  # of the picture before it was cut and resized
    "crop_top_left": Key(np.int32, "B 2", 0),  # of the window, in the picture resized for it
    "target_size": Key(np.int32, "B 2", 1),  # of the training picture
    "aesthetic_score": Key(np.float32, "B"),  # people's rating of the picture, usually 1 to 10
    "weight": Key(np.float32, "B", 0),  # 0 = padding
    "example_weight": Key(np.float32, "B", 0),  # a factor of the loss in training
}


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raise a ValueError that names a wrong key, its fault and the expected dtype, shape or range.

    Keys that are not in the contract pass if they are numbers, since a task may add keys. Bytes
    pass where numbers in [-1, 1] are expected, since a compiled step scales them.
    """
    for name, value in batch.items():
        array = np.asarray(value)
        if name not in KEYS:
            if array.dtype.kind not in "biuf":
                raise ValueError(f"batch[{name!r}]: got dtype {array.dtype}, expected numbers")
            continue
        key = KEYS[name]
        if array.dtype == np.uint8 and (key.low, key.high) == (-1, 1):
            key = key._replace(dtype=np.uint8, low=0, high=255)
        if array.dtype != key.dtype:
            expected = np.dtype(key.dtype).name
            raise ValueError(f"batch[{name!r}]: got dtype {array.dtype}, expected {expected}")
        dims = key.shape.split()
        fixed = [(i, int(d)) for i, d in enumerate(dims) if d.isdigit()]
        if array.ndim != len(dims) or any(array.shape[i] != d for i, d in fixed):
            raise ValueError(f"batch[{name!r}]: got shape {array.shape}, expected [{key.shape}]")
        if array.size == 0:
            continue
        low, high = float(array.min()), float(array.max())
        if not (key.low <= low and high <= key.high):  # NaN fails too
            raise ValueError(
                f"batch[{name!r}]: got values in [{low:g}, {high:g}], "
                f"expected [{key.low:g}, {key.high:g}]"
            )
