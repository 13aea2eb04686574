"""Random numbers that depend on the example and the step, never on the device.

Every training step derives one key per example from (seed, step, global example index), so the
noise of example i at step s is the same on 1 device and on 256.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from latent_diffusion.core.types import Array, Bool, Float, Int, Key, Keys


def seed_key(seed: int) -> Key[Array, ""]:
    """The key of a seed of 64 bits; ValueError for a seed outside this range.

    For seeds of 32 bits it is the key of `jax.random.key`, which takes 32 bits only.
    """
    upper, lower = _halves(seed)
    key = jax.random.key(lower)
    if not upper:
        return key
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(data.at[0].set(upper), impl=jax.random.key_impl(key))


def _halves(seed: int) -> tuple[int, int]:
    """The upper and the lower 32 bits of a seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must lie in [0, 2^64)")
    return divmod(seed, 2**32)


def init_key(seed: int) -> Key[Array, ""]:
    """A key for the initial parameters of networks, whose draws compile fast.

    A network draws hundreds of arrays once. Compiling as many draws of JAX's generators takes XLA
    longer than compiling a training step: a draw by `threefry2x32` or `rbg` is hundreds of
    operations, and a draw by this hash of (key, index) is twenty. Seeds are as in `seed_key`.
    """
    upper, lower = _halves(seed)
    key = jax.random.key(lower, impl=_HASHED)
    return jax.random.fold_in(key, upper) if upper else key


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all bits (Wellons 2018, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _hashed_seed(seed: jax.Array) -> jax.Array:
    return _hashed_fold_in(jnp.zeros(2, jnp.uint32), seed)


def _hashed_fold_in(key: jax.Array, data: Any) -> jax.Array:
    """The data change the first half of the key, which then changes the second half."""
    first = _mixed(key[0] ^ _mixed(jnp.asarray(data).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
    return jnp.stack([first, _mixed(key[1] + first)])


def _hashed_split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    keys = jax.vmap(_hashed_fold_in, (None, 0))(key, jnp.arange(prod(shape)))
    return keys.reshape(*shape, 2)


def _hashed_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    index = jnp.arange(prod(shape), dtype=jnp.uint32)
    bits = _mixed(_mixed(index ^ key[0]) + key[1])
    return (bits >> (32 - bit_width)).astype(f"uint{bit_width}").reshape(shape)


_HASHED = define_prng_impl(
    key_shape=(2,),
    seed=_hashed_seed,
    split=_hashed_split,
    random_bits=_hashed_bits,
    fold_in=_hashed_fold_in,
    name="hashed",
    tag="hash",
)


class SamplingKeys(NamedTuple):
    """The keys [B] of all random draws of a sampling call, which are all different."""

    start: Keys  # the noise from which sampling starts
    steps: Keys  # the noise of the sampler's steps
    hole: Keys  # the noise of a picture around its holes
    conditions: Keys  # the noise of conditions


def sampling_keys(keys: Keys) -> SamplingKeys:
    """Split the key of every image into the keys of its sampling call."""
    return SamplingKeys(*split_per_example(keys, len(SamplingKeys._fields)))


def example_keys(rng: Key[Array, ""], batch_size: int, axis_name: str | None = None) -> Keys:
    """One key per local example: `rng` folded with the example's index in the global batch.

    batch_size: number of local examples. axis_name: the mapped axis under pmap, where device d
    holds the global examples d·batch_size … (d+1)·batch_size − 1.
    """
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch_size
    return keys_of_examples(rng, first + jnp.arange(batch_size))


def keys_of_examples(rng: Key[Array, ""], index: Int[Array, " B"]) -> Keys:
    """The keys of the examples with these global indices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(independent(rng), index)


def independent(keys: Key[Array, "*B"]) -> Key[Array, "*B"]:
    """The keys, but those of JAX's `rbg` and `unsafe_rbg` as keys of `threefry2x32`.

    Under vmap JAX draws by the first `rbg` key alone, so that the noise of an example would depend
    on its companions.
    """
    if "rbg" not in str(jax.random.key_impl(keys)):
        return keys
    return jax.random.wrap_key_data(jax.random.key_data(keys)[..., :2], impl="threefry2x32")


def split_per_example(keys: Keys, num: int) -> tuple[Keys, ...]:
    """Split every example's key into `num` keys; returns `num` arrays of [B] keys."""
    split = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return tuple(split[:, i] for i in range(num))


def normal_per_example(keys: Keys, shape: Sequence[int]) -> Float[Array, "B ..."]:
    """Standard normal noise [B *shape]; each example's noise comes from its key."""
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)


def uniform_per_example(keys: Keys, shape: Sequence[int] = ()) -> Float[Array, "B ..."]:
    """Uniform noise in [0, 1) of shape [B *shape]; each example's noise comes from its key."""
    return jax.vmap(lambda key: jax.random.uniform(key, tuple(shape)))(keys)


def bernoulli_per_example(keys: Keys, probability: float) -> Bool[Array, " B"]:
    """True with `probability`, independently for each example."""
    return uniform_per_example(keys) < probability


def pmean(tree, axis_name: str | None):
    """Mean over the mapped axis; the identity where there is none (arrays are global then)."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
