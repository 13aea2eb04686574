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

Rng = jax.Array  # one typed PRNG key
Keys = Key[Array, " B"]  # one typed PRNG key per example
Axis = str | None  # the name of the mapped axis under pmap; None where arrays are global
Params = PyTree[Any]
Batch = Mapping[str, Any]  # key -> array [B ...], on the host or traced
KeysAndValues = Sequence[tuple[Any, Any]]  # of tokens [B S C], from several sources
Number = Any  # a Python number, or an array [] as the input of a program
Config = Any  # an ml_collections ConfigDict, or a mapping with the same fields


@flax.struct.dataclass
class Conditioning:
    """The output of a conditioner, by its three routes into the U-Net.

    concat: [B h w c'] channels appended to the noisy latent.
    context: [B L D] tokens attended to by cross-attention.
    vector: [B D] added to the timestep embedding.
    tokens: [B P] int32 in front of a prior's codes; token_maps: [B n h w] the same, of the size of
        the codes' grid.
    guidance: [B] guidance scales minus one, for a U-Net with `guidance_dim`.
    residuals: of control nets, [B h w c] for each skip of the U-Net and for its middle: they join
        the way up. features: of T2I-Adapters, the same places or None: they join the way down.
    controls: inputs of the control nets of a `nets.control.Controlled`, which makes the residuals.
    image_context: of IP-Adapters, by the names of an attention of the U-Net and of its block:
        further keys and values of the cross-attention, [B S C], a pair for each adapter.
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
    window: [B 2] timesteps (as the network sees them) after which, and until which, it counts.
    """

    hint: jax.Array
    scales: jax.Array
    window: jax.Array


def module_fields(config: Config) -> dict[str, Any]:
    """The fields of a module from those of a config, where the dtype is a name or None."""
    fields = dict(config)
    fields["dtype"] = jnp.dtype(fields["dtype"]) if fields.get("dtype") else None
    return fields


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`; ValueError, which lists the names in the table, for another name.

    what: a word for the names, such as "sampler".
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]
