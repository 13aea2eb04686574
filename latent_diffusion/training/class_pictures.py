"""Prior preservation (Ruiz et al. 2023, DreamBooth): while a model learns a subject from few
pictures, it also trains on pictures of the subject's class that it drew before the training.

    class-IDENTITY.npy  uint8 [N H W C] in the workdir: the pictures of a run, drawn once

The identity is a hash of the fields that the pictures depend on.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.core.rng import seed_key
from latent_diffusion.data.layout import WHOLE
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.runtime import parallel, processes, workdir
from latent_diffusion.runtime.metrics import to_uint8

Batches = Iterator[dict[str, np.ndarray]]
Show = Callable[[Any, jax.Array], Any]  # (batch, key) -> pictures


def check(config: ConfigDict) -> None:
    """Raise ValueError if a run can't draw pictures of the class `dreambooth.class_prompt`."""
    fields, half = config.dreambooth, config.batch_size // 2
    if not fields.class_prompt:
        return
    _, hosts = parallel.process_shard(*parallel.devices(config.parallel))
    faults = {
        "a model to draw with: name it by init_from": not config.init_from,
        "task='denoising' and no control": config.task != "denoising" or bool(config.control),
        "a model that is conditioned on text alone": {*make_conditioner(config.conditioners).keys}
        != {"tokens"},
        "first_stage.cache=False": config.first_stage.cache,
        "cache_texts=False": config.cache_texts,
        "pictures, not their latents": config.data.name == "latents",
        "data.bucket_step=0": config.data.bucket_step > 0,
        "an even batch_size: half of a batch is of the class": config.batch_size % 2 == 1,
        f"half of batch_size={config.batch_size} to divide over {hosts} processes": half % hosts,
        f"dreambooth.num_images of at least {half}, half a batch": fields.num_images < half,
        "dreambooth.prior_weight of at least 0": not fields.prior_weight >= 0,
    }
    for need, absent in faults.items():
        if absent:
            raise ValueError(f"dreambooth.class_prompt={fields.class_prompt!r} needs {need}")


def with_class(
    config: ConfigDict, batches: Batches, of_class: Batches
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of which one half is of the subject and the other of the class.

    By `example_weight`, the mean loss of a batch is the subject's loss plus
    `dreambooth.prior_weight` times the class's loss.
    """
    for subject, other in zip(batches, of_class, strict=False):
        keys = subject.keys() & other.keys()
        joint = {key: np.concatenate([subject[key], other[key]]) for key in keys}
        weights = np.array([2.0, 2.0 * config.dreambooth.prior_weight], np.float32)
        yield {**joint, "example_weight": np.repeat(weights, len(other["tokens"]))}


def make_source(
    config: ConfigDict,
    directory: Path,
    goes_on: bool,
    tokenizer: Any,
    show: Show,
) -> data.ArraySource:
    """The pictures of the class with their captions; a new run draws them if they are missing.

    show: the task's compiled `show`, with the initial state. Raises ValueError if the pictures of a
    resumed run are gone.
    """
    count, there = config.dreambooth.num_images, sorted(directory.glob("class-*.npy"))
    path = directory / f"class-{_identity(config)}.npy"
    if goes_on:  # fields may have changed since
        if len(there) != 1:
            raise ValueError(f"{directory} has lost its class-*.npy: start in another workdir")
        path = there[0]
    elif processes.any_process(not path.exists()):
        captions = data.ArraySource({"caption": _captions(config, count)})
        drawn = _drawn(config, captions, tokenizer, show)
        if jax.process_index() == 0:
            for other in there:
                other.unlink()
            with workdir.whole(path) as partial, partial.open("wb") as file:
                np.save(file, drawn)
        processes.barrier("pictures of the class are drawn")
    pictures = np.load(path, mmap_mode="r")
    arrays = {"image": pictures, "caption": _captions(config, len(pictures))}
    return data.ArraySource({**arrays, "window": [WHOLE] * len(pictures)})  # they are cut already


def _captions(config: ConfigDict, count: int) -> list[str]:
    """The captions of `dreambooth.class_prompt`, in turn."""
    captions = (caption.strip() for caption in config.dreambooth.class_prompt.split(";"))
    return list(itertools.islice(itertools.cycle(captions), count))


def _identity(config: ConfigDict) -> str:
    fields = {name: config.to_dict()[name] for name in ("init_from", "seed", "sampling")}
    fields |= {name: config.dreambooth[name] for name in ("class_prompt", "num_images")}
    text = json.dumps({**fields, "size": config.data.image_size}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _drawn(
    config: ConfigDict, captions: data.ArraySource, tokenizer: Any, show: Show
) -> np.ndarray:
    """A picture for each caption, uint8; all processes share the work."""
    transform = data.make_transform(config.data, train=False, tokenizer=tokenizer)
    shard = parallel.process_shard(*parallel.devices(config.parallel))
    rng = jax.random.fold_in(seed_key(config.seed), 1)
    pictures = []
    for i, batch in enumerate(data.epoch(captions, transform, config.batch_size, *shard)):
        batch.pop("weight")
        pictures.append(to_uint8(show(batch, jax.random.fold_in(rng, i))["samples"]))
    return np.concatenate(pictures)[: len(captions)]
