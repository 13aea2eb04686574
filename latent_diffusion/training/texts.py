"""Texts encoded once: a file in the workdir with the outputs of frozen encoders for all captions.

    texts-IDENTITY.npy   a row for each text: `tokens` int32 [L], and the encoders' outputs
                         float32, such as "clip_text.context" [L D] and "clip_text_2.vector" [D]

The identity is a hash of the encoders, of the tokenizer's result on a sample, and of the captions.
The encoders' outputs may be larger than memory.

Alternatively, shards of latents have them, from `python -m latent_diffusion.encode`: the entry
`texts` of an example is the list of such rows for its captions.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.core.rng import init_key
from latent_diffusion.core.types import Params, lookup
from latent_diffusion.data.shards import ShardSource
from latent_diffusion.nets.conditioners import encoded_apart, make_conditioner
from latent_diffusion.runtime import parallel, processes
from latent_diffusion.runtime.checkpoint import tree_hash
from latent_diffusion.tasks import DENOISERS, TASKS
from latent_diffusion.training import frozen, init_from, moments
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.tokenizer import make_tokenizer

Encoders = Mapping[str, Params]  # parameters by the name of a conditioner
Transform = Any  # as `data.make_transform` returns it


def frozen_encoders(config: ConfigDict, state: Any, constants: Any) -> Encoders:
    """The conditioners that read only tokens and that the run doesn't train.

    Raises ValueError, in one line, if there are none.
    """
    if config.task not in DENOISERS or config.textual_inversion.word:
        raise ValueError(
            "cache_texts=True is for latent denoising with frozen text encoders; "
            f"task={config.task!r}, textual_inversion.word={config.textual_inversion.word!r}"
        )
    frozen = dict(constants.conditioner)
    if constants.base is not None:  # an adaptation may change some of the encoders
        adapted = state.params.get("lora", {}).get("conditioner", {})
        base = constants.base["conditioner"]
        frozen |= {name: params for name, params in base.items() if name not in adapted}
    conditioner = make_conditioner(config.conditioners)
    parts = zip(conditioner.config, conditioner.parts(), strict=True)
    readers = [name for name, part in parts if part.keys == ("tokens",)]
    if not (encoders := {name: frozen[name] for name in readers if name in frozen}):
        raise ValueError(
            "cache_texts=True: none of the conditioners is a frozen text encoder (see pretrained): "
            f"{', '.join(config.conditioners) or 'there are none'}"
        )
    return encoders


def with_encoded(
    config: ConfigDict,
    directory: Path,
    encoders: Encoders,
    source: data.Source,
    tokenizer: Any,
    transform: Transform,
) -> Transform:
    """The transform, which adds the outputs of the encoders to an example's `tokens`.

    directory: the run's workdir, which all processes share. source: examples with captions.
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
    """Rows for the texts with these tokens [N L], in order, on every process, batch by batch.

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


class ForShards:
    """The frozen text encoders of a config, which `encode` runs on the devices of this process.

    made: their description in the index of the shards. Raises ValueError if there are none.
    """

    def __init__(self, config: ConfigDict, source: data.Source, dtype: str):
        bundle = init_from.read(config)
        config, tokenizer = make_tokenizer(config, source, None, bundle)
        if tokenizer is None:
            raise ValueError("cache_texts=True needs a tokenizer, not tokenizer.name='none'")
        self._tokenizer = tokenizer
        task: Any = lookup(TASKS, config.task, "task")(config)
        init = functools.partial(task.init, batch_spec=batch_spec(config))
        state, constants = jax.eval_shape(init, init_key(config.seed))
        params = frozen.load_conditioners(config, constants.conditioner, None)
        constants = constants.replace(conditioner=params)
        if constants.base is not None:  # an adaptation's base, whose network isn't needed
            base = {"conditioner": constants.base["conditioner"]}
            constants = init_from.base_from(config, constants.replace(base=base), bundle)
        encoders = frozen_encoders(config, state, constants)
        conditioner = make_conditioner(config.conditioners)
        sample = [text for i in _some(source) for text in _texts_of(source[i])]
        tokens = hashlib.sha256(self._tokenizer(sample).tobytes()).hexdigest()
        self.made = [*_hashes(config, encoders), ["tokenizer", tokens]]

        def encode(encoders: Any, batch: Any) -> Any:
            out = encoded_apart(conditioner, encoders, batch)
            return {name: array.astype(dtype) for name, array in out.items()}

        self._run = parallel.compile_local(encode, encoders)
        self._rows = config.batch_size + -config.batch_size % jax.local_device_count()

    def added(self, examples: Iterator[data.Example]) -> Iterator[data.Example]:
        """The examples with `texts`."""
        for group in iter(lambda: list(itertools.islice(examples, self._rows)), []):
            captions = [_texts_of(example) for example in group]
            tokens = self._tokenizer([text for texts in captions for text in texts])
            tokens, places = np.unique(tokens, axis=0, return_inverse=True)
            rows, left = self._of(tokens), iter(places.reshape(-1).tolist())
            for example, texts in zip(group, captions, strict=True):
                yield {**example, "texts": [rows[next(left)] for _ in texts]}

    def _of(self, tokens: np.ndarray) -> list[dict[str, np.ndarray]]:
        """A row for each text, in batches of one size."""
        rows = []
        for first in range(0, len(tokens), self._rows):
            part = tokens[first : first + self._rows]
            filled = np.concatenate([part, np.repeat(part[-1:], self._rows - len(part), 0)])
            out = self._run({"tokens": filled})
            rows += [
                {"tokens": text, **{name: array[i] for name, array in out.items()}}
                for i, text in enumerate(part)
            ]
        return rows


def from_shards(
    config: ConfigDict,
    encoders: Encoders,
    source: ShardSource,
    tokenizer: Any,
    transform: Transform,
) -> Transform:
    """The transform, which adds the outputs in the shards to an example's `tokens`.

    Raises ValueError, in one line, for outputs of other encoders or of another tokenizer.
    """
    in_shards = dict(source.made["texts"])
    for name, hash_of_encoder in _hashes(config, encoders):
        if in_shards.get(name) != hash_of_encoder:
            others = ", ".join(sorted(in_shards.keys() - {"tokenizer"}))
            raise ValueError(
                f"{source.folder} has texts of {others}, but not of this run's {name}: encode anew "
                "with its encoders, or set cache_texts=False"
            )

    def row_of(example: data.Example, tokens: np.ndarray) -> Mapping[str, np.ndarray]:
        for row in example["texts"]:
            if np.array_equal(row["tokens"], tokens):
                return row  # type: ignore[no-any-return]
        raise ValueError(
            f"{source.folder} has texts of another tokenizer than this run's: encode anew with "
            "it, or set cache_texts=False"
        )

    for i in _some(source):
        example = source[i]
        for text in _texts_of(example):
            row_of(example, tokenizer([text])[0])

    def transform_and_add(example: data.Example, rng: Any = None) -> data.Example:
        out = transform(example, rng)
        row = row_of(example, out["tokens"])
        outputs = {key: x for key, x in row.items() if key.partition(".")[0] in encoders}
        return {**out, **{key: x.astype(np.float32) for key, x in outputs.items()}}

    return transform_and_add


def _some(source: data.Source) -> list[int]:
    """The indices of a few examples, evenly over the source."""
    return np.linspace(0, len(source) - 1, moments.SAMPLE).astype(int).tolist()


def _texts_of(example: data.Example) -> list[str]:
    """The texts that training may draw for an example."""
    if "caption" not in example:
        raise ValueError(f"cache_texts=True: no caption; the example has: {', '.join(example)}")
    caption = example["caption"]
    return [caption] if isinstance(caption, str) else [*caption] or [""]


def _hashes(config: ConfigDict, encoders: Encoders) -> list[list[str]]:
    """Each encoder's name, and a hash of its parameters and fields."""
    hashes = []
    for name, params in sorted(encoders.items()):
        fields = json.dumps(config.conditioners[name].to_dict(), sort_keys=True, default=str)
        digest = hashlib.sha256(f"{name} {tree_hash(params)}{fields}".encode())
        hashes.append([name, digest.hexdigest()])
    return hashes


def _identity(config: ConfigDict, encoders: Encoders, texts: Sequence[str], tokenizer: Any) -> str:
    digest = hashlib.sha256()
    for name, hash_of_encoder in _hashes(config, encoders):
        digest.update(f"{name} {hash_of_encoder}".encode())
    sample = texts[:: -(-len(texts) // moments.SAMPLE)]
    digest.update(np.ascontiguousarray(tokenizer(sample)).tobytes())
    digest.update("\0".join(texts).encode())
    return digest.hexdigest()[:12]
