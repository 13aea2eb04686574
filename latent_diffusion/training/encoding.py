"""Encodes pictures once, into shards, for `python -m latent_diffusion.encode`."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.core.types import lookup
from latent_diffusion.data import buckets, shards
from latent_diffusion.data.folders import Folder
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.runtime import metrics, parallel, processes
from latent_diffusion.runtime.checkpoint import tree_hash
from latent_diffusion.training import frozen, init_from, moments, start, texts
from latent_diffusion.training.settings import flat

Example = dict[str, Any]
# Values that belong to a window of a picture; all others belong to the whole picture.
_OF_CROPS = ("window", "image", "segmentation", "mask", "depth")


def encode(
    config: ConfigDict,
    out: str | Path,
    dtype: str = "float32",
    crops: int = 1,
    shard_size: int = 4096,
    splits: Sequence[str] = ("train", "test"),
) -> None:
    """Write out/SPLIT for the splits; see `data.shards`. The command's flags are the arguments.

    Raises ValueError, in one line, for bad input and if the folder has other shards; OSError if the
    disk is full: then all earlier shards are complete.
    """
    lookup(dict.fromkeys(["float32", "bfloat16"]), dtype, "dtype")
    if crops < 1 or (crops > 1 and config.data.crop != "random"):
        raise ValueError(f"crops={crops} needs data.crop='random', not {config.data.crop!r}")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1")
    if config.task == "autoencoding" or config.data.name == "latents":
        raise ValueError("encode takes the config of a run that will train on latents of pictures")
    config = start.with_files(config)
    start.check_new(config)
    for split in splits:
        source = data.make_source(config.data, split)
        train = {"dtype": dtype, "crops": crops} if split == "train" else None
        _encode_split(config, source, Folder(out) / split, shard_size, train)


def _encode_split(
    config: ConfigDict,
    source: Any,
    folder: Folder,
    shard_size: int,
    train: dict[str, Any] | None,
) -> None:
    """Write the shards of this process; process 0 also writes the index.

    train: None for a split whose pictures aren't encoded, and are cropped as in evaluation.
    """
    latents = None if train is None else _Latents(config, train["dtype"])
    captions = None
    if train is not None and config.cache_texts:
        captions = texts.ForShards(config, source, train["dtype"])
    made = _made(config, source, latents, train or {"crops": 1})
    made |= {"texts": [] if captions is None else captions.made}
    plan = list(_plan(config, source, shard_size, train is not None))
    made |= {"examples": len(source), "shard_size": shard_size, "num_shards": len(plan)}
    if jax.process_index() == 0:
        _begin(folder, made)
    processes.barrier("the index is there")
    names = [shards.shard_name(number) for number in range(len(plan))]
    of_process = range(jax.process_index(), len(plan), jax.process_count())
    there = folder.sizes()
    todo = [number for number in of_process if names[number] not in there]
    prepare, done = _prepare(config, source, made), itertools.count(1)
    total = sum(len(plan[number][1]) for number in todo)
    with metrics.Progress(total, unit="picture") as progress:
        for number in todo:
            prepared = _in_order(functools.partial(prepare, size=plan[number][0]), plan[number][1])
            records = prepared if latents is None else latents.added(prepared, made["pictures"])
            records = records if captions is None else captions.added(records)
            try:
                shards.write_shard(folder, names[number], _counted(records, done, progress))
            except OSError as error:
                whole = len(folder.sizes().keys() & {*names})
                raise OSError(
                    f"{error}; {whole} of {len(names)} shards of {folder} are whole: make room, "
                    "and the same command goes on"
                ) from error
    processes.barrier("all shards are there")
    if jax.process_index() == 0:
        there = folder.sizes()
        listed = [
            shards.Shard(name, len(indices), there[name], size)
            for name, (size, indices) in zip(names, plan, strict=True)
        ]
        shards.write_index(folder, made, listed)
        in_all = sum(shard.bytes for shard in listed)
        print(f"{folder}: {len(source)} examples in {len(listed)} shards, {in_all / 1e9:.3g} GB")


def _plan(config: ConfigDict, source: Any, shard_size: int, train: bool) -> Iterator[Any]:
    """The size (None: the square) and the examples of every shard, all of one bucket."""
    parts: list[tuple[Any, Any]] = [(None, np.arange(len(source)))]
    if train and config.data.bucket_step:
        buckets.check(config.data)
        sizes = buckets.bucket_sizes(config.data.image_size, config.data.bucket_step)
        bucket_of = buckets.assign(buckets.shapes_of(source), sizes)
        parts = [(size, np.flatnonzero(bucket_of == i)) for i, size in enumerate(sizes)]
    for size, indices in parts:
        for first in range(0, len(indices), shard_size):
            yield size, indices[first : first + shard_size]


def _made(config: ConfigDict, source: Any, latents: Any, options: dict[str, Any]) -> dict[str, Any]:
    """How the examples are made, for runs and resumed commands, which compare it."""
    return {
        "kind": "pictures" if latents is None else latents.kind,
        "first_stage": None if latents is None else latents.hash,
        "pictures": latents is None or moments.pictures_are_seen(config),
        "mirrors": latents is not None and config.data.flip,
        **options,
        "seed": config.seed,
        "data": {k: v for k, v in config.data.to_dict().items() if k not in moments.SAME_DATA},
        "sample": moments.sample_hash(source),
        "annotations": _hash_of_annotations(source),
    }


def _hash_of_annotations(source: Any) -> str:
    """A hash of the captions, classes and files of maps of a folder; "" for other sources."""
    entries = getattr(source, "annotations", None)
    if entries is None:
        return ""
    names = [{k: getattr(v, "name", v) for k, v in sorted(entry.items())} for entry in entries]
    return hashlib.sha256(repr(names).encode()).hexdigest()


def _begin(folder: Folder, made: dict[str, Any]) -> None:
    """Write an index without shards; remove incomplete shards.

    Raises ValueError if the folder has shards that were made with other settings.
    """
    there = folder.sizes()
    if shards.INDEX in there:
        before, listed = shards.read_index(folder)
        have, had = flat(made), flat(before)
        for name in [name for name in have if name in had and have[name] != had[name]]:
            raise ValueError(
                f"{folder} was begun with {name}={had[name]!r}, not {have[name]!r}: choose another "
                "--out"
            )
        for shard in listed or ():
            if there.get(shard.name, shard.bytes) != shard.bytes:
                folder.remove(shard.name)
    shards.write_index(folder, made, None)


def _prepare(config: ConfigDict, source: Any, made: dict[str, Any]) -> Callable[..., Example]:
    """Return `prepare(i, size)`: example i with its crops, which depend only on the seed and i."""
    cut_out = data.make_cut(config.data, train=made["kind"] != "pictures")

    def prepare(index: Any, size: Any) -> Example:
        rng = np.random.default_rng([config.seed, index])
        read = {k: v for k, v in source[int(index)].items() if k in moments.EXAMPLE_KEYS}
        read |= {} if size is None else {"size": size}
        cuts = [cut_out(read, rng) for _ in range(made["crops"])]
        example = {k: v for k, v in cuts[0].items() if k not in _OF_CROPS}
        crops = [{k: v for k, v in cut.items() if k in _OF_CROPS} for cut in cuts]
        return {**example, "crops": crops}

    return prepare


def _in_order(prepare: Callable[[int], Example], indices: Any) -> Iterator[Example]:
    """The examples of some indices, in order, which threads prepare ahead."""
    examples = grain.MapDataset.source(indices).map(prepare)
    return iter(examples.to_iter_dataset(grain.ReadOptions(prefetch_buffer_size=64)))


def _counted(records: Iterator[Example], done: Iterator[int], progress: Any) -> Iterator[Example]:
    """The records; each is counted when it is written."""
    for record in records:
        yield record
        count = next(done)
        progress.update(count)
        progress.report(count, {})


class _Latents:
    """The first stage of a config, which encodes pictures on the devices of this process."""

    def __init__(self, config: ConfigDict, dtype: str):
        size, channels = config.data.image_size, config.autoencoder.image_channels
        module, image = make_autoencoder(config.autoencoder), jnp.zeros((1, size, size, channels))
        fresh = jax.eval_shape(lambda: init_first_stage(module, jax.random.key(0), image))
        first_stage, _ = frozen.read_first_stage(config, fresh, init_from.read(config))
        unscaled = first_stage.replace(scale_factor=jnp.ones(()), shift=jnp.zeros(()))
        self.kind, self.hash = moments.kind_of(config), tree_hash(first_stage.params)
        codes, mirrored = self.kind == "codes", config.data.flip

        def latents(first_stage: Any, image: jax.Array) -> jax.Array:
            image = image.astype(jnp.float32) / 127.5 - 1
            images = [image, image[:, :, ::-1]] if mirrored else [image]
            made = [
                first_stage.indices({"image": x}) if codes else first_stage.moments(x)
                for x in images
            ]
            return jnp.stack(made, 1).astype(jnp.int32 if codes else dtype)

        self._run = parallel.compile_local(latents, unscaled)
        self._rows = config.batch_size + -config.batch_size % jax.local_device_count()

    def added(self, examples: Iterator[Example], with_pictures: bool) -> Iterator[Example]:
        """The examples with `mirrors` in their crops, with or without their pictures."""
        for group in iter(lambda: list(itertools.islice(examples, self._rows)), []):
            crops = [crop for example in group for crop in example["crops"]]
            for crop, latents in zip(crops, self._of([c["image"] for c in crops]), strict=True):
                crop["mirrors"] = [{self.kind: latent} for latent in latents]
                if not with_pictures:
                    del crop["image"]
            yield from group

    def _of(self, images: list[Any]) -> Iterator[Any]:
        """The latents [mirrors h w c] of each picture, in batches of one size."""
        for first in range(0, len(images), self._rows):
            part = images[first : first + self._rows]
            filled = part + part[-1:] * (self._rows - len(part))
            yield from self._run(np.stack(filled))[: len(part)]
