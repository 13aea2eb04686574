"""Array aliases, the container of conditionings, and the glossary of dimensions.

Dimensions in shape annotations:

    B      examples in a batch            H W    image height and width, in pixels
    C      image channels                 h w c  latent height, width and channels
    L      tokens in a sequence           D      width of a token or vector
    T      timesteps of a noise schedule  S      sampling steps
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree

Rng = jax.Array  # a typed PRNG key
Keys = Key[Array, " B"]  # a typed PRNG key per example
Axis = str | None  # the name of the mapped axis under pmap; None where arrays are global
Params = PyTree[Any]
Batch = Mapping[str, Any]  # key -> array [B ...], on the host or traced
KeysAndValues = Sequence[tuple[Any, Any]]  # attention's keys and values [B S C], by source
Number = Any  # a Python number, or an array [] as the input of a program
Config = Any  # an ml_collections ConfigDict, or a mapping with the same fields


@flax.struct.dataclass
class Conditioning:
    """The output of conditioners, by its routes into the network.

    concat: [B h w c'] channels appended to the noisy latent.
    context: [B L D] tokens attended to by cross-attention.
    vector: [B D] added to the timestep embedding.
    tokens: [B P] int32 in front of a prior's codes; token_maps: [B n h w] int32 on the codes' grid.
    guidance: [B] guidance scales minus one, for a U-Net with `guidance_dim`.
    residuals: outputs of control nets, [B h w c] for each skip connection of the U-Net and for its
        middle; they are added on the upward path. features: outputs of T2I-Adapters for the same
        places, or None; they are added on the downward path.
    controls: inputs of the control nets of a `nets.control.Controlled`, which makes the residuals.
    image_context: further keys and values [B S C] for the U-Net's cross-attention, from
        IP-Adapters: a pair for each adapter, by the names of the attention's block and module.
    """

    concat: jax.Array | None = None
    context: jax.Array | None = None
    vector: jax.Array | None = None
    tokens: jax.Array | None = None
    token_maps: jax.Array | None = None
    guidance: jax.Array | None = None
    residuals: tuple[jax.Array | None, ...] = ()
    features: tuple[jax.Array | None, ...] = ()
    controls: tuple["Control", ...] = ()
    image_context: Mapping[str, Mapping[str, "KeysAndValues"]] | None = None


@flax.struct.dataclass
class Control:
    """The input of a control net.

    hint: [B h w F] the embedding of its picture. scales: [B n] factors of the n residuals.
    window: [B 2] the network's timesteps between which the control net is used.
    """

    hint: jax.Array
    scales: jax.Array
    window: jax.Array


def module_fields(config: Config) -> dict[str, Any]:
    """The fields of a module from those of a config, in which the dtype is a name or None."""
    fields = dict(config)
    fields["dtype"] = as_dtype(fields["dtype"]) if fields.get("dtype") else None
    return fields


def as_dtype(name: Any) -> Any:
    """The dtype of a name such as "bfloat16"; ValueError for an unknown name."""
    try:
        return jnp.dtype(name)
    except TypeError:
        raise ValueError(f"unknown dtype {name!r}; known: bfloat16, float16, float32") from None


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`; for an unknown name, a ValueError that lists the names in the table.

    what: a word for the names, such as "sampler".
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]
