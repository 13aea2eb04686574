"""The shapes of a run's batches, computed only from its config."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion.core.types import lookup
from latent_diffusion.models.first_stage import make_autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.tasks import DENOISERS

_BATCH_SPECS = {  # batch keys that conditioners read -> (shape without B, dtype)
    "image": lambda config: ((*_square(config), config.autoencoder.image_channels), np.float32),
    "tokens": lambda config: ((config.tokenizer.max_length,), np.int32),
    "class_label": lambda config: ((), np.int32),
    "layout": lambda config: ((_reader(config, "layout").max_length,), np.int32),
    "segmentation": lambda config: (_square(config), np.int32),
    "mask": lambda config: ((*_square(config), 1), np.float32),
    "low_res": lambda config: (
        (*_square(config, make_autoencoder(config.autoencoder).downsampling), 3),
        np.float32,
    ),
    "depth": lambda config: ((*_square(config), 1), np.float32),
    "neighbours": lambda config: (
        (config.conditioners.neighbours.num_neighbours, config.conditioners.neighbours.width),
        np.float32,
    ),
    **dict.fromkeys(
        ("original_size", "crop_top_left", "target_size"), lambda config: ((2,), np.int32)
    ),
    "aesthetic_score": lambda config: ((), np.float32),
    "image_embedding": lambda config: ((config.conditioners.image_embedding.width,), np.float32),
}


def class_counts(config: ConfigDict) -> dict[str, int]:
    """The number of classes of every part of the model that reads classes, by its section."""
    if config.task == "classifying":
        return {"classifier": config.classifier.num_classes}
    return {name: part.num_classes for name, part in _parts(config) if "class_label" in part.keys}


def _parts(config: ConfigDict) -> list[tuple[str, Any]]:
    """The conditioners of the model, by their sections."""
    if config.task not in (*DENOISERS, "prior"):
        return []
    conditioner = make_conditioner(config.conditioners)
    sections = [f"conditioners.{name}" for name in conditioner.config]
    return list(zip(sections, conditioner.parts(), strict=True))


def check_classes(config: ConfigDict, source: Any) -> None:
    """Raise ValueError if the data have more classes than the model, which would be the null.

    Some sources know their classes only example by example: see `with_checked_examples`.
    """
    counts = class_counts(config)
    if not counts:
        return  # before counting, which may read all examples
    in_data = getattr(source, "num_classes", len(getattr(source, "class_names", ())))
    for section, count in counts.items():
        if in_data > count:
            raise ValueError(
                f"the data have {in_data} classes, and {section}.num_classes={count}: give it more"
            )


def with_checked_examples(config: ConfigDict, transform: Any) -> Any:
    """The transform, which raises ValueError for an example that the model can't read.

    It lacks a condition, its class isn't one of the model's, or a part of its label map has none.
    Latents may stand for the picture.
    """
    counts, conditions = class_counts(config), batch_spec(config).keys() - {"image"}
    of_maps = {name: part for name, part in _parts(config) if hasattr(part, "unread_square")}

    def checked(example: Any, rng: Any = None) -> Any:
        out = transform(example, rng)
        if absent := sorted(conditions - out.keys()):
            made_by = " (tokenizer.name='none')" if absent[0] == "tokens" else ""
            raise ValueError(
                f"no {absent[0]}, which the model reads{made_by}; the example has: "
                f"{', '.join(example)}"
            )
        for section, count in counts.items():
            if not 0 <= (label := int(out.get("class_label", 0))) < count:
                remedy = "give it more" if label > 0 else "classes are numbers from 0"
                raise ValueError(
                    f"class_label={label} of {example.get('name', 'an example')}, and "
                    f"{section}.num_classes={count}: {remedy}"
                )
        for section, part in of_maps.items():
            if unread := part.unread_square(out["segmentation"]):
                raise ValueError(
                    f"segmentation of {example.get('name', 'an example')}: {unread}; "
                    f"{section}.num_classes={part.num_classes}"
                )
        return out

    return checked


def _square(config: ConfigDict, f: int = 1) -> tuple[int, int]:
    return (config.data.image_size // f, config.data.image_size // f)


def _reader(config: ConfigDict, key: str) -> Any:
    """The first conditioner that reads a batch key."""
    return next(part for part in make_conditioner(config.conditioners).parts() if key in part.keys)


def batch_spec(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of one global batch, before anything is read."""
    shapes = {"image": _BATCH_SPECS["image"](config)}
    if config.task in (*DENOISERS, "prior"):
        keys = make_conditioner(config.conditioners).keys
    elif config.task == "classifying":
        keys = ("class_label",)
    else:
        keys = tuple(filter(None, [config.autoencoding.disc_condition]))
    for key in keys:
        shapes[key] = lookup(_BATCH_SPECS, key, "batch key")(config)
    return {
        key: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
        for key, (shape, dtype) in shapes.items()
    }
