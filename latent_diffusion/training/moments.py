"""Latents encoded once: a file in the workdir with the moments of all training examples.

    moments-IDENTITY.npy  float32 [N h w 2C], read by memory map
    codes-IDENTITY.npy    int32 [N h w], the places in the codebook on which a prior is trained

The identity is a hash of the first stage, of `config.data`, and of the number and a sample of the
examples. A run that goes on finds its file and doesn't encode again. The training set may be larger
than memory.
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
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.runtime import parallel, processes, workdir
from latent_diffusion.runtime.checkpoint import tree_hash

SAMPLE = 16  # examples whose pixels enter the identity


def with_moments(
    config: ConfigDict, directory: Path, first_stage: FirstStage, source: data.Source
) -> data.ArraySource:
    """A source of `moments` beside the other entries of the examples in `source`, already cut.

    Pictures stay where a condition needs them. directory: the run's workdir, which all processes
    see. For a prior, `codes` are in the place of moments. Raises ValueError where images are
    augmented at random, since all epochs would then have the same augmentation.
    """
    if config.data.flip or config.data.crop == "random":
        raise ValueError("first_stage.cache=True needs data.flip=False and data.crop not 'random'")
    kind = "codes" if config.task == "prior" else "moments"
    path = directory / f"{kind}-{_identity(config, first_stage, source)}.npy"
    if processes.any_process(not path.exists()):
        write_rows(path, _encoded(config, first_stage, source), len(source))
        processes.barrier("moments are written")
    seen = bool(config.data.low_res) or "image" in make_conditioner(config.conditioners).keys
    keys = {*data.KEYS, "caption", "boxes", "labels", "window"} - (set() if seen else {"image"})
    cut_out, rng = data.make_cut(config.data, train=True), np.random.default_rng(0)
    examples = [
        {key: value for key, value in cut_out(source[i], rng).items() if key in keys}
        for i in range(len(source))
    ]
    arrays = {key: [example[key] for example in examples] for key in examples[0]}
    return data.ArraySource({kind: np.load(path, mmap_mode="r"), **arrays})


def _identity(config: ConfigDict, first_stage: FirstStage, source: data.Source) -> str:
    digest = hashlib.sha256(tree_hash(first_stage.params).encode())
    digest.update(json.dumps(config.data.to_dict(), sort_keys=True).encode())
    digest.update(str(len(source)).encode())
    for i in np.linspace(0, len(source) - 1, SAMPLE).astype(int).tolist():
        digest.update(np.ascontiguousarray(source[i]["image"]).tobytes())
    return digest.hexdigest()[:12]


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

    Process 0 writes, while the others help to encode.
    """
    if jax.process_index() != 0:
        for _ in batches:
            pass
        return
    with workdir.whole(path) as partial, partial.open("wb") as file:
        left = length
        for batch in batches:
            if left == length:  # the first one tells the shape
                dtype = np.dtype("<i4" if batch.dtype.kind == "i" else "<f4")
                if batch.dtype.names:  # arrays side by side
                    dtype = batch.dtype
                header: dict[str, Any] = {"shape": (length, *batch.shape[1:])}
                header |= {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(batch[:left], dtype).tobytes())
            left -= min(left, len(batch))
    kind = path.name.partition("-")[0]
    for other in set(path.parent.glob(f"{kind}-*.npy")) - {path}:
        other.unlink()
