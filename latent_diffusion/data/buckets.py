"""Pictures of many shapes: batches of one size each (NovelAI 2022; Podell et al. 2023, 2.3).

A bucket is a size. A picture belongs to the bucket for which the least of it is cut away, and a
batch has pictures of one bucket, so that there are few shapes of batches. Batch number s is a pure
function of (seed, s), as without buckets. In every epoch the pictures of each bucket are shuffled
and put into whole batches, and the batches are shuffled; the pictures that are left over are not
used in this epoch.
"""

import functools
import logging
from typing import Any

import numpy as np

from latent_diffusion.data.sources import Around, Example, Source
from latent_diffusion.data.windows import Size

logger = logging.getLogger(__name__)

_LONGEST = 2  # longest side ÷ data.image_size; for the shortest side it is the inverse
_ENDLESS = 2**62  # number of examples of an endless source


def bucket_sizes(image_size: int, step: int) -> list[Size]:
    """The sizes whose sides are multiples of `step`, with about image_size² pixels.

    They have image_size² pixels at most and more than (image_size − step)²; their sides lie between
    a half of image_size and twice image_size. Raises ValueError where the square of image_size
    isn't among them.
    """
    if step < 1 or image_size % step or image_size < 2 * step:
        raise ValueError(
            f"data.bucket_step={step} must divide data.image_size={image_size} at least twice"
        )
    sides = range(-(-image_size // _LONGEST // step) * step, _LONGEST * image_size + 1, step)
    least, most = (image_size - step) ** 2, image_size**2
    return [(h, w) for h in sides for w in sides if least < h * w <= most]


def check(data_config: Any) -> None:
    """Raise ValueError for fields that only work with squares."""
    c = data_config
    if c.crop == "none" or c.shorter_side or c.mask or c.balance:
        raise ValueError(
            "data.bucket_step cuts pictures to the sizes of buckets: it needs another data.crop "
            "than 'none', data.shorter_side=0, data.mask='' and data.balance=0"
        )


def cut_share(shape: Any, size: Any) -> Any:
    """The share of a picture's area that is cut away for a size.

    shape, size: (height, width), or arrays of them [… 2].
    """
    shape, size = np.asarray(shape, float), np.asarray(size, float)
    ratio = shape[..., 0] / shape[..., 1] * size[..., 1] / size[..., 0]
    return 1 - np.minimum(ratio, 1 / ratio)


def assign(shapes: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """The bucket of each picture [N]: the one with the least area cut away, and then the largest.

    shapes: height and width [N 2] of the pictures.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i][0] * sizes[i][1])
    table = np.array([sizes[i] for i in order])
    kinds, places = np.unique(shapes, axis=0, return_inverse=True)
    parts = np.array_split(kinds, -(-len(kinds) // 65536))
    best = [np.argmin(np.round(cut_share(part[:, None], table), 9), 1) for part in parts]
    return np.asarray(order)[np.concatenate(best)][places.reshape(-1)]


def shapes_of(source: Any) -> np.ndarray:
    """Height and width [N 2] of all pictures; they are decoded if the source has no `shapes`."""
    if hasattr(source, "shapes"):
        return np.asarray(source.shapes())
    return np.array([source[i]["image"].shape[:2] for i in range(len(source))])


class Bucketed(Around):
    """A source with the endless order of examples in training, each with its bucket's `size`.

    Examples s·B … (s+1)·B − 1 are batch s.
    """

    def __init__(self, source: Source, data_config: Any, batch_size: int, seed: int):
        check(data_config)
        self.source, self.seed, self._batch_size = source, seed, batch_size
        self.sizes = bucket_sizes(data_config.image_size, data_config.bucket_step)
        bucket_of = assign(shapes_of(source), self.sizes)
        counts = np.bincount(bucket_of, minlength=len(self.sizes))
        used = [i for i, count in enumerate(counts) if count >= batch_size]
        small = [i for i, count in enumerate(counts) if 0 < count < batch_size]
        if small:
            first = "{1}×{0}".format(*self.sizes[small[0]])
            words = (
                f"{len(small)} of {len(used) + len(small)} buckets have fewer pictures than a "
                f"batch ({batch_size}), so {counts[small].sum()} of {len(bucket_of)} pictures "
                f"aren't trained on, e.g. {counts[small[0]]} of {first} pixels"
            )
            if not used:
                raise ValueError(f"{words}: set batch_size to {counts.max()} or less")
            logger.warning("%s", words)
        self._members = {i: np.flatnonzero(bucket_of == i).astype(np.uint32) for i in used}
        self._order = functools.lru_cache(2)(self._epoch)  # threads may read from two epochs

    def __len__(self) -> int:
        return _ENDLESS

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = functools.lru_cache(2)(self._epoch)

    def __getitem__(self, index: int) -> Example:
        step, row = divmod(int(index), self._batch_size)
        epoch, place = divmod(step, self.batches_per_epoch)
        buckets, rows = self._order(epoch)
        return {**self.source[int(rows[place, row])], "size": self.sizes[buckets[place]]}

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """The number of whole batches."""
        return sum(len(members) // self._batch_size for members in self._members.values())

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket [S] of each batch and the examples [S B] in it."""
        rng = np.random.default_rng([self.seed, epoch])
        buckets, rows = [], []
        for bucket, members in self._members.items():
            count = len(members) // self._batch_size
            rows.append(rng.permutation(members)[: count * self._batch_size].reshape(count, -1))
            buckets.append(np.full(count, bucket))
        order = rng.permutation(self.batches_per_epoch)
        return np.concatenate(buckets)[order], np.concatenate(rows)[order]
