"""Sets of pictures: samples of a trained model, computed while they are read; and its data."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.core.rng import seed_key
from latent_diffusion.core.types import Config
from latent_diffusion.evaluate.collect import CHUNK
from latent_diffusion.evaluate.images import ImageSet, version_of
from latent_diffusion.generation.conditions import argument
from latent_diffusion.generation.model import Model
from latent_diffusion.runtime.metrics import as_picture, to_uint8


class Rows:
    """The values of a condition for some examples, which are read when a slice is taken."""

    def __init__(self, rows: np.ndarray, read: Callable[[int], Any]):
        self._rows, self._read = rows, read

    def __getitem__(self, where: slice) -> list[Any] | np.ndarray:
        values = [self._read(int(i)) for i in self._rows[where]]
        return np.stack(values) if isinstance(values[0], np.ndarray) else values


def conditions_of(
    model: Model, source: Any, transform: Any, count: int, seed: int
) -> dict[str, Rows]:
    """Conditions for `count` samples, from the examples of `source` in random order; by name.

    transform: the transform of evaluation, for conditions that are computed from an example.
    """
    keys = model.conditioner.keys if model.denoiser or model.prior else ()
    captions = data.captions(source) if "tokens" in keys else []
    total = len(captions) or len(source)
    if keys and not total:
        raise ValueError("the data has no conditions to sample for")
    order = np.random.default_rng(seed).permutation
    passes = [order(total) for _ in range(0, count, max(total, 1))]
    rows = np.concatenate(passes)[:count]
    if set(keys) - {"tokens"} and total != len(source):
        raise ValueError("several captions a picture can't be paired with other conditions")

    def reader(key: str) -> Callable[[int], Any]:
        if key == "tokens":
            return captions.__getitem__
        if key == "class_label":
            return lambda i: int(source[i]["class_label"])
        return lambda i: transform(source[i], np.random.default_rng(i))[key]

    return {argument(key): Rows(rows, reader(key)) for key in keys}


def version_of_conditions(conditions: dict[str, Rows], source: Any, count: int) -> str:
    """A hash of the prompts; for other conditions, of the files and annotations of the data.

    Files are those of the pictures and those that annotations name, such as maps.
    """
    found: list[Any] = [list(conditions["prompts"][0:count])] if "prompts" in conditions else []
    if conditions.keys() - {"prompts"}:
        annotations = getattr(source, "annotations", ())
        maps = (v for entry in annotations for v in entry.values() if isinstance(v, Path))
        files = itertools.chain(getattr(source, "paths", ()), maps)
        found += [len(source), version_of(files), annotations]
    return hashlib.sha256(repr(found).encode(errors="surrogateescape")).hexdigest()


def samples(
    model: Model,
    conditions: dict[str, Rows],
    count: int,
    seed: int,
    batch_size: int,
    images_dir: Path | None = None,
    **options: Any,
) -> ImageSet:
    """`count` samples; sample i depends only on the seed, its condition and i.

    images_dir: also write them as NNNNN.png. options: for `Model.sample`.
    """

    def read(start: int, stop: int) -> np.ndarray:
        if start % CHUNK:
            raise ValueError(f"samples are made in chunks of {CHUNK}, not from {start}")
        rng = jax.random.fold_in(seed_key(seed), start // CHUNK)
        values: dict[str, Any] = {name: rows[start:stop] for name, rows in conditions.items()}
        images = model.sample(
            rng,
            num_images=1 if values else stop - start,
            batch_size=batch_size,
            **values,
            **options,
        )
        pixels = to_uint8(images)
        if images_dir is not None and jax.process_index() == 0:
            images_dir.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(pixels, start):
                as_picture(image).save(images_dir / f"{i:05d}.png")
        return pixels

    prompts = conditions.get("prompts")
    captions = None if prompts is None else lambda n: list(prompts[0:n])
    return ImageSet("samples", count, read, captions)


def of_data(config: Config, split: str) -> ImageSet:
    """The pictures of a run's data as uint8, with evaluation's transform, which isn't random.

    Shards of latents have pictures for evaluations alone; reading others raises ValueError.
    """
    source = data.make_source(config.data, split)
    no_conditions = {"low_res": "", "mask": "", "layout": {}}
    pictures_alone = ConfigDict({**dict(config.data), **no_conditions})
    transform = data.make_transform(pictures_alone, train=False)

    def read(start: int, stop: int) -> np.ndarray:
        examples = (source[i] for i in range(start, stop))
        seen = [
            transform({key: example[key] for key in ("image", "crops") if key in example})
            for example in examples
        ]
        if not all("image" in example for example in seen):
            raise ValueError(
                f"{name}: these shards hold latents without pictures; give --reference, or "
                "--split=test"
            )
        return to_uint8(np.stack([example["image"] for example in seen]))

    name = f"{config.data.name}@{split}"
    return ImageSet(name, len(source), read, version=version_of(getattr(source, "paths", ())))
