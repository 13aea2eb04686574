"""Data: sources with random access, transforms of examples, and batches of examples."""

from collections.abc import Callable
from typing import Any

from latent_diffusion.core.types import lookup
from latent_diffusion.data import (
    image_folder,
    openmoji_scenes,
    openmoji_source,
    openmoji_wide,
    parquet,
    shards,
    synthetic,
    tars,
    tfds,
)
from latent_diffusion.data.balance import Balanced
from latent_diffusion.data.buckets import Bucketed
from latent_diffusion.data.contract import KEYS, check_batch
from latent_diffusion.data.pipeline import epoch, iterate
from latent_diffusion.data.retrieval import with_embeddings
from latent_diffusion.data.sources import ArraySource, Example, Source, captions
from latent_diffusion.data.transforms import make_cut, make_transform

__all__ = [
    "DATASETS",
    "KEYS",
    "ArraySource",
    "Balanced",
    "Bucketed",
    "Example",
    "Source",
    "captions",
    "check_batch",
    "epoch",
    "iterate",
    "make_cut",
    "make_source",
    "make_transform",
]

DATASETS: dict[str, Callable[[Any, str], Any]] = {
    "openmoji": openmoji_source.make,
    "twemoji": openmoji_source.make,
    "openmoji+twemoji": openmoji_source.make,
    "openmoji_scenes": openmoji_scenes.make,
    "openmoji_wide": openmoji_wide.make,
    "image_folder": image_folder.make,
    "latents": shards.make,
    "synthetic": synthetic.make,
    "parquet": parquet.make,
    "tars": tars.make,
    "tfds": tfds.make,  # "tfds:NAME"
}
# Fields of some data sets alone; shards may be named in the config that they were made with.
_OWN = {"caption_column": ("image_folder",), "features": ("tfds", "parquet")}


def check_fields(data_config: Any) -> None:
    """Raise ValueError for a field that the data set ignores."""
    kind = data_config.name.partition(":")[0]
    for field, kinds in _OWN.items():
        if data_config.get(field) and kind not in (*kinds, "latents"):
            raise ValueError(f"data.{field} is for {' and '.join(kinds)}, not for {kind}")


def make_source(data_config: Any, split: str) -> Any:
    """The source `data_config.name` for the role "train" or "test".

    `data_config.train_split` and `test_split` name the splits of the data set for the two roles;
    shards lie in folders of the roles themselves.
    `data_config.embedding` adds image embeddings, and neighbours in the training set.
    Raises a ValueError of one line for an unknown data set or split.
    """
    make = lookup(DATASETS, data_config.name.partition(":")[0], "data.name")
    roles = {"train": data_config.train_split, "test": data_config.test_split}
    name = lookup(roles, split, "split")
    if data_config.name == "latents":  # which have embeddings, too
        return make(data_config, split)
    source = make(data_config, name)
    if not data_config.get("embedding", ""):
        return source
    database = source if split == "train" else make(data_config, roles["train"])
    return with_embeddings(source, split, database, data_config)
