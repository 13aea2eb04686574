"""Latents encoded once: a file in the workdir with the moments of all training examples.

    moments-IDENTITY.npy  float32 [N h w 2C], read by memory map
    codes-IDENTITY.npy    int32 [N h w], the codebook indices on which a prior is trained

The identity is a hash of the first stage, of `config.data`, and of the number and a sample of the
examples. A resumed run has its file and doesn't encode again. The training set may be larger than
memory.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.data.folders import encoded
from latent_diffusion.data.shards import ShardSource
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.runtime import parallel, processes, workdir
from latent_diffusion.runtime.checkpoint import tree_hash

SAME_DATA = ("dir", "embedding_path", "search", "workers")  # fields of `data` without effect on it
SAMPLE = 16  # examples whose pixels enter the identity
EXAMPLE_KEYS = {*data.KEYS, "caption", "boxes", "labels", "window"}  # the transform reads these
# Fields of `data` that affect the encoded pictures
SHARD_FIELDS = ("image_size", "crop", "shorter_side", "bucket_step")


def with_moments(
    config: ConfigDict, directory: Path, first_stage: FirstStage, source: data.Source
) -> data.ArraySource:
    """A source of `moments` beside the other entries of the examples in `source`, already cropped.

    Pictures stay if a condition needs them. directory: the run's workdir, which all processes
    share. A prior gets `codes` instead of moments. Raises ValueError if images are augmented at
    random, since all epochs would then have the same augmentation.
    """
    if config.data.flip or config.data.crop == "random" or config.data.bucket_step:
        raise ValueError(
            "first_stage.cache=True needs data.flip=False, data.crop not 'random' and "
            "data.bucket_step=0: set first_stage.cache=False, or use shards of "
            "python -m latent_diffusion.encode, which serve them all"
        )
    kind = kind_of(config)
    path = directory / f"{kind}-{_identity(config, first_stage, source)}.npy"
    if processes.any_process(not path.exists()):
        write_rows(path, _encoded(config, first_stage, source), len(source))
        processes.barrier("moments are written")
    keys = EXAMPLE_KEYS - (set() if pictures_are_seen(config) else {"image"})
    keys -= set() if config.data.sizes else {"original_size"}  # some sources have it for a part
    cut_out, rng = data.make_cut(config.data, train=True), np.random.default_rng(0)
    examples = [
        {key: value for key, value in cut_out(source[i], rng).items() if key in keys}
        for i in range(len(source))
    ]
    arrays = {key: [example[key] for example in examples] for key in examples[0]}
    return data.ArraySource({kind: np.load(path, mmap_mode="r"), **arrays})


def pictures_are_seen(config: ConfigDict) -> bool:
    """Whether a condition is computed from the pictures, not from their latents."""
    is_read = "image" in make_conditioner(config.conditioners).keys
    return is_read or bool(config.data.low_res) or bool(config.control)


def check_shards(config: ConfigDict, source: ShardSource) -> None:
    """Raise ValueError, in one line, if a run needs other examples than the shards have."""
    made, folder, kind = source.made, source.folder, kind_of(config)
    if config.task == "autoencoding":
        raise ValueError("data.name='latents' has no pictures, which autoencoding is trained on")
    if config.first_stage.cache:
        raise ValueError("data.name='latents' is cached: set first_stage.cache=False")
    if made["kind"] != kind:
        raise ValueError(f"{folder} has {made['kind']}, but task={config.task!r} needs {kind}")
    embedded = ("embedding", "num_neighbours") if config.data.embedding else ()
    for field in (*SHARD_FIELDS, *embedded):
        have, had = config.data[field], made["data"][field]
        if have != had:
            raise ValueError(f"data.{field}={have!r}, but {folder} was made with {had!r}")
    for field, needed, present in (
        ("data.flip=True", config.data.flip, made["mirrors"]),
        ("data.sizes=True", config.data.sizes, made["data"]["sizes"]),
        ("a condition made of pictures", pictures_are_seen(config), made["pictures"]),
    ):
        if needed and not present:
            raise ValueError(f"{field} was not asked for when {folder} was made: encode anew")


def check_first_stage(config: ConfigDict, source: ShardSource, first_stage: FirstStage) -> None:
    """Raise ValueError, in one line, for latents of another first stage."""
    if source.made["first_stage"] != tree_hash(first_stage.params):
        path = f" ({config.first_stage.path})" if config.first_stage.path else ""
        raise ValueError(
            f"{source.folder} has latents of another first stage than that of this run{path}: "
            "encode the pictures with this one, or name theirs by first_stage.path"
        )


def kind_of(config: ConfigDict) -> str:
    """The batch key of the stored form of a picture: "codes" or "moments"."""
    return "codes" if config.task == "prior" else "moments"


def _identity(config: ConfigDict, first_stage: FirstStage, source: data.Source) -> str:
    digest = hashlib.sha256(tree_hash(first_stage.params).encode())
    fields = {k: v for k, v in config.data.to_dict().items() if k not in SAME_DATA}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    digest.update(str(len(source)).encode())
    digest.update(sample_hash(source).encode())
    return digest.hexdigest()[:12]


def sample_hash(source: data.Source) -> str:
    """A hash of the pixels of a few examples, evenly over the source.

    Of a folder of pictures, the names and sizes of all files enter it, too.
    """
    digest = hashlib.sha256()
    for path in getattr(source, "paths", ()):
        try:
            size: int | None = path.stat().st_size
        except OSError:
            size = None  # a link to nowhere
        digest.update(encoded(f"{path.name} {size}\n"))
    for i in np.linspace(0, len(source) - 1, SAMPLE).astype(int).tolist():
        digest.update(np.ascontiguousarray(source[i]["image"]).tobytes())
    return digest.hexdigest()


def _encoded(
    config: ConfigDict, first_stage: FirstStage, source: data.Source
) -> Iterator[np.ndarray]:
    """Moments of the examples in order, on every process; the last batch is padded."""
    mode, mesh = parallel.devices(config.parallel)
    index, count = parallel.process_shard(mode, mesh)

    def encode(state, first_stage, batch, rng, *, axis_name=None):
        if config.task == "prior":
            return first_stage.indices(batch)
        return first_stage.moments(batch["image"])

    run = parallel.compile_eval(encode, mode, mesh=mesh)
    transform = data.make_transform(config.data, train=False)
    rng = jax.random.key(0)
    for batch in data.epoch(source, transform, config.batch_size, index, count):
        yield run({}, first_stage, {"image": batch["image"]}, rng)


def write_rows(path: Path, batches: Iterator[np.ndarray], length: int) -> None:
    """Write KIND-IDENTITY.npy of `length` rows, and remove other files of this kind.

    Only process 0 writes; the others take part in encoding.
    """
    if jax.process_index() != 0:
        for _ in batches:
            pass
        return
    with workdir.whole(path) as partial, partial.open("wb") as file:
        left = length
        for batch in batches:
            if left == length:  # the first batch determines the shape
                dtype = np.dtype("<i4" if batch.dtype.kind == "i" else "<f4")
                if batch.dtype.names:  # a structured array
                    dtype = batch.dtype
                header: dict[str, Any] = {"shape": (length, *batch.shape[1:])}
                header |= {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(batch[:left], dtype).tobytes())
            left -= min(left, len(batch))
    kind = path.name.partition("-")[0]
    for other in set(path.parent.glob(f"{kind}-*.npy")) - {path}:
        other.unlink()
