"""Samples of a trained model as a set of pictures that is made as it is read."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from latent_diffusion import data
from latent_diffusion.evaluation.collect import CHUNK
from latent_diffusion.evaluation.images import ImageSet
from latent_diffusion.metrics import to_uint8
from latent_diffusion.model import Model
from latent_diffusion.types import Config, lookup


def conditions_of(model: Model, source: Any, count: int, seed: int) -> dict[str, list[Any]]:
    """Prompts or class labels for `count` samples, as they occur in `source`, in random order."""
    keys = model.denoiser.conditioner.keys if model.denoiser else ()
    order = np.random.default_rng(seed).permutation

    def cycled(values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("the data has no conditions to sample for")
        rows = np.concatenate([order(len(values)) for _ in range(0, count, len(values))])
        return [values[i] for i in rows[:count]]

    def prompts() -> tuple[str, list[Any]]:
        return "prompts", cycled(data.captions(source))

    def labels() -> tuple[str, list[Any]]:
        return "class_labels", cycled([int(source[i]["class_label"]) for i in range(len(source))])

    known = {"tokens": prompts, "class_label": labels}
    return dict(lookup(known, key, "condition to evaluate with")() for key in keys)


def samples(
    model: Model,
    conditions: dict[str, list[Any]],
    count: int,
    seed: int,
    batch_size: int,
    images_dir: Path | None = None,
    **options: Any,
) -> ImageSet:
    """`count` samples; the i-th depends on the seed, its condition and i only.

    images_dir: also write them as NNNNN.png. options: those of `Model.sample`.
    """

    def read(start: int, stop: int) -> np.ndarray:
        if start % CHUNK:
            raise ValueError(f"samples are made in chunks of {CHUNK}, not from {start}")
        rng = jax.random.fold_in(jax.random.key(seed), start // CHUNK)
        wanted: dict[str, Any] = {name: rows[start:stop] for name, rows in conditions.items()}
        images = model.sample(
            rng,
            num_images=1 if wanted else stop - start,
            batch_size=batch_size,
            **wanted,
            **options,
        )
        return _kept(to_uint8(images), start, images_dir)

    return ImageSet("samples", count, read)


def _kept(images: np.ndarray, start: int, folder: Path | None) -> np.ndarray:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images, start):
            Image.fromarray(image).save(folder / f"{i:05d}.png")
    return images


def of_data(config: Config, split: str) -> ImageSet:
    """The pictures of a run's own data as its evaluation sees them: nothing random, as uint8."""
    source = data.make_source(config.data, split)
    transform = data.make_transform(config.data, train=False)

    def read(start: int, stop: int) -> np.ndarray:
        examples = ({"image": source[i]["image"]} for i in range(start, stop))
        return to_uint8(np.stack([transform(example)["image"] for example in examples]))

    return ImageSet(f"{config.data.name}@{split}", len(source), read)
