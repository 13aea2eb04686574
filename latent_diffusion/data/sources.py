"""What a data set is: random access to examples. And two sources that need no files.

A source has a length and gives example `i` as a dict of NumPy arrays and strings: `image` uint8
[H W 3] of any size, `caption` str (or a list of them), `class_label` int, `name` str, or arrays
that are already what a batch wants (`moments`, `tokens`, ...).
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to examples; reading one twice gives the same thing."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Example number `index`, 0 ≤ index < len."""
        ...


class ArraySource:
    """Arrays that are indexed together, e.g. cached first-stage moments and their class labels.

    Lists do too, for what has no common shape: several captions per example.
    """

    def __init__(self, arrays: Mapping[str, Sequence[Any] | np.ndarray]):
        lengths = {key: len(array) for key, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"ArraySource: arrays need one common length, got {lengths}")
        self.arrays = dict(arrays)
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        example = {key: array[index] for key, array in self.arrays.items()}
        return {key: str(v) if isinstance(v, np.str_) else v for key, v in example.items()}


class Remember:
    """Keep decoded examples in memory until `max_bytes` are full; decode the others each time.

    4,000 pictures of 32×32 are 16 MB, and decoding them again every epoch would cost more than
    the rest of the input pipeline. Everything else is asked of the wrapped source.
    """

    def __init__(self, source: Source, max_bytes: int = 2**28):
        self.source = source
        self.max_bytes = max_bytes
        self.bytes = 0
        self._examples: dict[int, Example] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if index not in self._examples:
            example = self.source[index]
            arrays = [v for v in example.values() if isinstance(v, np.ndarray)]
            size = sum(array.nbytes for array in arrays)
            with self._lock:
                if self.bytes + size > self.max_bytes:
                    return example
                if index not in self._examples:
                    for array in arrays:
                        array.setflags(write=False)  # everybody gets the same one
                    self._examples[index] = example
                    self.bytes += size
        return dict(self._examples[index])


def captions(source: Any) -> list[str]:
    """Every caption of a source, without decoding images where the source knows a shorter way."""
    if hasattr(source, "captions"):
        return source.captions()
    found = [source[i].get("caption", "") for i in range(len(source))]
    return flat(found)


def flat(captions: Sequence[str | Sequence[str]]) -> list[str]:
    """One list of captions from entries that are a caption or several."""
    entries = ([entry] if isinstance(entry, str) else entry for entry in captions)
    return [caption for entry in entries for caption in entry]
