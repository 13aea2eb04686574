"""Sources: random access to the examples of a data set.

A source has a length, and its example `i` is a dict of NumPy arrays and strings: `image` uint8
[H W 3] of any size, `caption` str (or a list of them), `class_label` int, `name` str, or arrays
that batches have under the same key (`moments`, `tokens`, ...).
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

logger = logging.getLogger(__name__)

BLOCK = 4096  # pictures whose sizes are read at a time
Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to examples; every reading of an example has the same result."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Example number `index`, 0 ≤ index < len."""
        ...


class ArraySource:
    """Arrays that are indexed together, e.g. cached first-stage moments and their class labels.

    Values without a common shape, such as several captions per example, are in a list.
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


def check_split(split: str, folders: Sequence[str], root: object) -> None:
    """Raise ValueError for a split that the data at `root` don't have. folders: their splits.

    Without folders, examples are divided into "train" and "test", and "all" is both.
    """
    splits = list(folders) or ["all", "test", "train"]
    if split not in splits:
        raise ValueError(
            f"unknown split {split!r} of {root}; known: {', '.join(splits)} "
            "(data.train_split, data.test_split)"
        )


class Readable:
    """The base of sources of files: an example that can't be read is replaced by the next.

    Its name is logged once and added to `unreadable`, so that a bad file among a million doesn't
    end a run. Subclasses have `read(index)`, which raises ValueError, and `name_of(index)`.
    """

    def __init__(self, length: int):
        self._length = length
        self.unreadable: set[Any] = set()

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Example:
        """Example number `index`; ValueError if it can't be read."""
        raise NotImplementedError

    def name_of(self, index: int) -> Any:
        """The name of a file for messages."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            try:
                return self.read(at)
            except ValueError as error:
                if (name := self.name_of(at)) not in self.unreadable:
                    self.unreadable.add(name)
                    logger.warning("skipping %s: %s", name, error)
        raise ValueError(f"none of the {len(self)} images can be read, e.g. {self.name_of(0)}")

    def texts(self, caption_of: Callable[[int], Any]) -> list[str]:
        """All captions, in order, "" where an example has none or can't be read."""

        def text(index: int) -> str | list[str]:
            try:
                return check_caption(caption_of(index)) or ""
            except ValueError:
                return ""  # `read` logs its name

        texts = [text(index) for index in range(len(self))]
        if 0 < (empty := texts.count("")) < len(texts):
            logger.warning("%d of %d pictures have no caption", empty, len(texts))
        return flat(texts)

    def sizes(self, size_of: Callable[[int], tuple[int, int]]) -> np.ndarray:
        """Height and width [N 2] of all pictures, (1, 1) where unreadable; uses several threads."""

        def size(index: int) -> tuple[int, int]:
            try:
                return size_of(index)
            except ValueError:
                return (1, 1)  # `read` logs its name

        # Of all at once, a million would wait in the pool, with a kilobyte of memory each.
        blocks = (range(i, min(i + BLOCK, len(self))) for i in range(0, len(self), BLOCK))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return np.array([pair for block in blocks for pair in pool.map(size, block)])


class Around:
    """A source that wraps another one, `source`, and has its other attributes."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith(
            "__"
        ):  # a copy in a worker process has none at first
            raise AttributeError(name)
        return getattr(self.source, name)


class Remember(Around):
    """A source that caches decoded examples in memory, up to `max_bytes`.

    4,000 pictures of 32×32 pixels are 16 MB; decoding them in every epoch would cost more than the
    rest of the input pipeline.
    """

    def __init__(self, source: Source, max_bytes: int = 2**28):
        self.source = source
        self.max_bytes = max_bytes
        self.bytes = 0
        self._examples: dict[int, Example] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return type(self), (self.source, self.max_bytes)

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
                        array.setflags(write=False)  # all readers share it
                    self._examples[index] = example
                    self.bytes += size
        return dict(self._examples[index])


def check_caption(caption: Any, name: str = "caption") -> str | list[str]:
    """The caption, a text or a list of texts; ValueError for anything else. name: for messages."""
    try:
        "".join(caption if isinstance(caption, list) else [caption]).encode()
    except (TypeError, UnicodeEncodeError):  # half of a surrogate pair, which JSON can write
        raise ValueError(f"{name} is {caption!r}, expected a text") from None
    return caption


def captions(source: Any) -> list[str]:
    """All captions of a source; images are decoded only if it has no method `captions`."""
    if hasattr(source, "captions"):
        return source.captions()
    return flat([source[i].get("caption", "") for i in range(len(source))])


def flat(captions: Sequence[str | Sequence[str]]) -> list[str]:
    """A flat list of captions, from entries that are a caption or a list of captions."""
    entries = ([entry] if isinstance(entry, str) else entry for entry in captions)
    return [caption for entry in entries for caption in entry]
