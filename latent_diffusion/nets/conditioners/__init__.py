"""Conditioners turn a batch into the `Conditioning` of the denoiser.

A conditioner is a Linen module `__call__(batch, drop: Bool[B]) -> Conditioning`. It names the batch
`keys` that it reads, and it defines its null condition: an example whose `drop` is true becomes
unconditional, so that conditioning dropout in training and classifier-free guidance share one path.
Work that needs the frozen first stage or a random key is done before, in the method `prepare`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from latent_diffusion.core.rng import split_per_example
from latent_diffusion.core.types import (
    Array,
    Batch,
    Bool,
    Conditioning,
    Config,
    Keys,
    Params,
    Rng,
    as_dtype,
    lookup,
)
from latent_diffusion.nets.conditioners.bert import Bert
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.nets.conditioners.embeddings import ClassLabel, ImageEmbedding, Neighbours
from latent_diffusion.nets.conditioners.maps import LayoutMap, SpatialRescaler, WordMap
from latent_diffusion.nets.conditioners.pictures import Depth, LowRes, MaskedImage
from latent_diffusion.nets.conditioners.sequence import (
    ClassToken,
    CodeMap,
    Coordinates,
    LayoutTokens,
    SegmentationTokens,
    Start,
)
from latent_diffusion.nets.conditioners.sizes import Sizes
from latent_diffusion.nets.conditioners.t5_text import T5Text
from latent_diffusion.nets.conditioners.text import Layout, TextTransformer

T5 = "t5_text"
CONDITIONERS: dict[str, Any] = {
    "class_label": ClassLabel,
    "bert": Bert,
    "clip_image": ClipImage,
    "clip_text": ClipText,
    "clip_text_2": ClipText,
    "t5_text": T5Text,
    "text": TextTransformer,
    "layout": Layout,
    "layout_map": LayoutMap,
    "spatial_rescaler": SpatialRescaler,
    "low_res": LowRes,
    "masked_image": MaskedImage,
    "depth": Depth,
    "neighbours": Neighbours,
    "image_embedding": ImageEmbedding,
    "word_map": WordMap,
    "sizes": Sizes,
    "start": Start,
    "class_token": ClassToken,
    "layout_tokens": LayoutTokens,
    "segmentation_tokens": SegmentationTokens,
    "coordinates": Coordinates,
    "code_map": CodeMap,
}

_ENCODED = ("context", "vector")  # outputs that a batch may hold, see `encoded_apart`


def combine(parts: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings: `concat` along channels, `context` along tokens, `vector` along width.

    A prior's `tokens` are joined along their length, and so are its `token_maps`. Raises ValueError
    if other axes differ.
    """

    def join(field: str, axis: int) -> Array | None:
        arrays = [value for part in parts if (value := getattr(part, field)) is not None]
        shapes = [list(array.shape) for array in arrays]
        if len({str(np.delete(shape, axis)) for shape in shapes}) > 1:
            raise ValueError(
                f"conditioners give {field} of the shapes {' and '.join(map(str, shapes))}, which "
                f"may only differ in axis {axis}"
            )
        return jnp.concatenate(arrays, axis) if arrays else None

    axes = {"concat": -1, "context": 1, "vector": -1, "tokens": 1, "token_maps": 1}
    joined: dict[str, Any] = {field: join(field, axis) for field, axis in axes.items()}
    return Conditioning(**joined)


def _widened(part: Conditioning, width: int) -> Conditioning:
    """The conditioning with the tokens of its context padded by zeros to `width`."""
    context = part.context
    assert context is not None
    if context.shape[-1] > width:
        raise ValueError(f"the context of CLIP is {context.shape[-1]} wide, T5's only {width}")
    rest = ((0, 0), (0, 0), (0, width - context.shape[-1]))
    return dataclasses.replace(part, context=jnp.pad(context, rest))


class Conditioner(nn.Module):
    """Joins any number of conditioners; without any, the model is unconditional.

    config: {name of a conditioner: its fields}. The contexts of "clip_text" and "clip_text_2", two
    encoders of the same text, are joined along the width of each token. Beside "t5_text", as in
    Stable Diffusion 3, zeros pad this context to T5's width, and `tokens` are CLIP's, then T5's.
    """

    config: Mapping[str, Mapping[str, Any]]

    @property
    def keys(self) -> tuple[str, ...]:
        """Batch keys that the conditioners read."""
        return tuple(dict.fromkeys(key for part in self.parts() for key in part.keys))

    @property
    def optional(self) -> tuple[str, ...]:
        """Batch keys that the conditioners read, and whose values they draw if they are missing."""
        return tuple(key for part in self.parts() for key in getattr(part, "optional", ()))

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None = None
    ) -> Batch:
        """Add to the batch the latents, noise and resized maps that conditioners read.

        Call it before `__call__`, once per batch. first_stage: the frozen `FirstStage`. size:
        (h, w) of the latent. rng: one key for each example, for conditioners that add noise.
        """
        self._check(batch)
        parts = [part for part in self.parts() if hasattr(part, "prepare")]
        keys: Any = [None] * len(parts)
        if rng is not None and parts:
            keys = split_per_example(rng, len(parts))
        for part, key in zip(parts, keys, strict=True):
            batch = part.prepare(batch, first_stage, size, key)
        return batch

    @nn.nowrap
    def init_from_spec(
        self, rng: Rng, batch_spec: Batch, first_stage: Any, size: tuple[int, ...]
    ) -> tuple[Conditioning, Params]:
        """The conditioning of one example of zeros, and fresh parameters by conditioner.

        batch_spec: arrays or ShapeDtypeStructs of a batch. first_stage, size: as in `prepare`.
        """
        example = {key: jnp.zeros((1, *x.shape[1:]), x.dtype) for key, x in batch_spec.items()}
        entries = self.prepare(example, first_stage, size, rng[None])
        conditioning, variables = self.init_with_output(rng, entries, jnp.zeros(1, bool))
        return conditioning, variables.get("params", {})

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        self._check(batch)
        parts: dict[str, Any] = {}
        for name, fields in self.config.items():
            part, inputs = CONDITIONERS[name](**fields, name=name), self.read_by(name, batch)
            encoded = {f: batch[f"{name}.{f}"] for f in _ENCODED if f"{name}.{f}" in batch}
            parts[name] = (
                _of_encoded(part, encoded, inputs, drop) if encoded else part(inputs, drop)
            )
        if parts.keys() >= {"clip_text", "clip_text_2"}:  # both read the same tokens
            first, second = parts["clip_text"], parts["clip_text_2"]
            context = jnp.concatenate([first.context, second.context], -1)
            parts["clip_text"] = dataclasses.replace(first, context=context)
            parts["clip_text_2"] = dataclasses.replace(second, context=None)
        if (t5 := self._t5()) is not None and "clip_text" in parts:
            parts["clip_text"] = _widened(parts["clip_text"], t5.width)
        return combine([*parts.values()])

    @nn.nowrap
    def read_by(self, name: str, batch: Batch) -> Batch:
        """The batch as a conditioner reads it: without T5's tokens for all conditioners but T5."""
        t5 = self._t5()
        if name == T5 or t5 is None or t5.absent or "tokens" not in batch:
            return batch
        return {**batch, "tokens": batch["tokens"][:, : -t5.max_length]}

    @nn.nowrap
    def _t5(self) -> T5Text | None:
        return T5Text(**self.config[T5], parent=None) if T5 in self.config else None

    @nn.nowrap
    def parts(self) -> list[Any]:
        """The single conditioners, unbound."""
        return [CONDITIONERS[name](**f, parent=None) for name, f in self.config.items()]

    @nn.nowrap
    def _check(self, batch: Batch) -> None:
        missing = [key for key in self.keys if key not in batch]
        if missing:
            raise ValueError(
                f"conditioning needs {', '.join(missing)}; the batch has {', '.join(sorted(batch))}"
            )


def encoded_apart(
    conditioner: Conditioner, params: Mapping[str, Params], batch: Batch
) -> dict[str, Array]:
    """Outputs of some conditioners, without dropping conditions, as batch entries.

    params: by the names of the conditioners. An entry is named "clip_text.context", for example;
    `Conditioner` takes such an entry instead of running the conditioner.
    """
    entries: dict[str, Array] = {}
    drop = jnp.zeros(next(iter(batch.values())).shape[0], bool)
    for name, part_params in params.items():
        part = CONDITIONERS[name](**conditioner.config[name], parent=None)
        out = part.apply({"params": part_params}, conditioner.read_by(name, batch), drop)
        outputs = {f"{name}.{field}": getattr(out, field) for field in _ENCODED}
        entries |= {key: value for key, value in outputs.items() if value is not None}
    return entries


def _of_encoded(
    part: nn.Module, encoded: Mapping[str, Array], batch: Batch, drop: Bool[Array, " B"]
) -> Conditioning:
    """The conditioning from cached outputs, with the null condition where `drop` is true."""
    example = {key: jnp.zeros_like(batch[key][:1]) for key in part.keys}
    null = part(example, jnp.ones(1, bool))
    joined: dict[str, Any] = {
        field: jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), getattr(null, field), x)
        for field, x in encoded.items()
    }
    return Conditioning(**joined)


def tables(config: Mapping[str, Any]) -> dict[str, str]:
    """The paths of the word embedding tables, by the names of the conditioners that have such."""
    return {n: CONDITIONERS[n].table for n in config if hasattr(CONDITIONERS[n], "table")}


def rows_of_words(config: Mapping[str, Any]) -> int:
    """The number of rows of all word embedding tables; ValueError if the numbers differ."""
    rows = {CONDITIONERS[name](**config[name]).vocab_size for name in tables(config)}
    if len(rows) != 1:
        raise ValueError(f"conditioners: vocab_size is {sorted(rows)}; a word needs one for all")
    return int(*rows)


def with_rows(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config with `count` more rows in the word embedding tables of all conditioners."""
    modules = {name: CONDITIONERS[name](**fields) for name, fields in config.items()}
    rows = {name: {"vocab_size": modules[name].vocab_size + count} for name in tables(config)}
    return {name: {**fields, **rows.get(name, {})} for name, fields in config.items()}


def make_conditioner(config: Config) -> Conditioner:
    """The conditioners that `config` names; ValueError for unknown names or fields.

    They are in alphabetical order, as a ConfigDict's entries are: a text's vector, for example,
    precedes the vector of sizes.
    """
    for name, fields in config.items():
        module = lookup(CONDITIONERS, name, "conditioner")
        allowed = [f for f in module.__dataclass_fields__ if f not in ("parent", "name")]
        unknown = sorted(set(fields) - set(allowed))
        if unknown:
            raise ValueError(
                f"conditioners.{name}: unknown field {unknown[0]!r}; known: {', '.join(allowed)}"
            )
        as_dtype(fields.get("dtype") or "float32")  # raises ValueError for another name

    def hashable(value: Any) -> Any:
        if hasattr(value, "items"):
            return FrozenDict({k: hashable(v) for k, v in value.items()})
        return tuple(value) if isinstance(value, list) else value  # a list comes from JSON

    fields_of = {name: {f: hashable(v) for f, v in config[name].items()} for name in sorted(config)}
    return Conditioner(fields_of)
