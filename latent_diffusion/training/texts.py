"""Texts encoded once: a file in the workdir with what frozen encoders make of all captions.

    texts-IDENTITY.npy   a row for each text: `tokens` int32 [L], and the encoders' outputs
                         float32, such as "clip_text.context" [L D] and "clip_text_2.vector" [D]

The identity is a hash of the encoders, of the tokenizer's work on a sample, and of the captions.
The encoders' outputs may be larger than memory.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.nets.conditioners import encoded_apart, make_conditioner
from latent_diffusion.runtime import parallel, processes
from latent_diffusion.runtime.checkpoint import tree_hash
from latent_diffusion.tasks import DENOISERS
from latent_diffusion.training import moments
from latent_diffusion.types import Params

Encoders = Mapping[str, Params]  # parameters by the name of a conditioner
Transform = Any  # as `data.make_transform` returns it


def frozen_encoders(config: ConfigDict, state: Any, constants: Any) -> Encoders:
    """The conditioners that read tokens alone and that the run doesn't train.

    Raises ValueError, in one line, where there are none.
    """
    if config.task not in DENOISERS or config.textual_inversion.word:
        raise ValueError(
            "cache_texts=True is for latent denoising with frozen text encoders; "
            f"task={config.task!r}, textual_inversion.word={config.textual_inversion.word!r}"
        )
    frozen = dict(constants.conditioner)
    if constants.base is not None:  # of an adaptation, which may change some of them
        adapted = state.params.get("lora", {}).get("conditioner", {})
        base = constants.base["conditioner"]
        frozen |= {name: params for name, params in base.items() if name not in adapted}
    conditioner = make_conditioner(config.conditioners)
    parts = zip(conditioner.config, conditioner.parts(), strict=True)
    readers = [name for name, part in parts if part.keys == ("tokens",)]
    if not (found := {name: frozen[name] for name in readers if name in frozen}):
        raise ValueError(
            "cache_texts=True: none of the conditioners is a frozen text encoder (see pretrained): "
            f"{', '.join(config.conditioners) or 'there are none'}"
        )
    return found


def with_encoded(
    config: ConfigDict,
    directory: Path,
    encoders: Encoders,
    source: data.Source,
    tokenizer: Any,
    transform: Transform,
) -> Transform:
    """The transform, to whose `tokens` are added the outputs of the encoders.

    directory: the run's workdir, which all processes see. source: examples with captions.
    """
    texts = sorted({*data.captions(source), ""})
    path = directory / f"texts-{_identity(config, encoders, texts, tokenizer)}.npy"
    if processes.any_process(not path.exists()):
        tokens = np.unique(tokenizer(texts), axis=0)
        moments.write_rows(path, encoded(config, encoders, tokens), len(tokens))
        processes.barrier("texts are encoded")
    rows = np.load(path, mmap_mode="r")
    place = {tokens.tobytes(): i for i, tokens in enumerate(rows["tokens"])}
    names = [name for name in rows.dtype.names if name != "tokens"]

    def transform_and_add(example: data.Example, rng: Any = None) -> data.Example:
        out = transform(example, rng)
        row = rows[place[out["tokens"].tobytes()]]
        return {**out, **{name: row[name] for name in names}}

    return transform_and_add


def encoded(config: ConfigDict, encoders: Encoders, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of the texts with these tokens [N L], in order, on every process, batch by batch.

    The last batch is padded.
    """
    mode, mesh = parallel.devices(config.parallel)
    index, count = parallel.process_shard(mode, mesh)
    conditioner = make_conditioner(config.conditioners)

    def encode(state, encoders, batch, rng, *, axis_name=None):
        return {**batch, **encoded_apart(conditioner, encoders, batch)}

    run = parallel.compile_eval(encode, mode, mesh=mesh)
    source = data.ArraySource({"tokens": tokens})
    for batch in data.epoch(source, lambda example, _: example, config.batch_size, index, count):
        out = run({}, encoders, {"tokens": batch["tokens"]}, jax.random.key(0))
        kinds = {name: "<i4" if name == "tokens" else "<f4" for name in out}
        rows = np.empty(
            len(out["tokens"]), [(n, kinds[n], x.shape[1:]) for n, x in sorted(out.items())]
        )
        for name, array in out.items():
            rows[name] = array
        yield rows


def _identity(config: ConfigDict, encoders: Encoders, texts: Sequence[str], tokenizer: Any) -> str:
    digest = hashlib.sha256()
    for name, params in sorted(encoders.items()):
        digest.update(f"{name} {tree_hash(params)}".encode())
        fields = config.conditioners[name].to_dict()
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    sample = texts[:: -(-len(texts) // moments.SAMPLE)]
    digest.update(np.ascontiguousarray(tokenizer(sample)).tobytes())
    digest.update("\0".join(texts).encode())
    return digest.hexdigest()[:12]
