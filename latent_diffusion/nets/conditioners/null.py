"""Null conditions: zeros where nothing is learned, the empty prompt for texts."""

from collections.abc import Sequence

import jax.numpy as jnp

from latent_diffusion.types import Array, Batch, Bool, Float, Int


def zeros_where(drop: Bool[Array, " B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Replace x by zeros in the examples that are dropped."""
    return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)


def empty_where(
    drop: Bool[Array, " B"], tokens: Int[Array, "B L"], empty: Sequence[int], pad_id: int
) -> Int[Array, "B L"]:
    """Replace tokens by the empty prompt in the examples that are dropped.

    empty: its tokens before the padding, e.g. those of begin and end. Raises ValueError for fewer
    than these.
    """
    row = [*empty, *[pad_id] * (tokens.shape[1] - len(empty))]
    if len(row) != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens a prompt have no room for empty={tuple(empty)}")
    return jnp.where(drop[:, None], jnp.array(row, tokens.dtype), tokens)


def prompts(
    name: str, batch: Batch, drop: Bool[Array, " B"], length: int, empty: Sequence[int], pad_id: int
) -> Int[Array, "B L"]:
    """`empty_where` of the batch's `tokens`; ValueError, which names the conditioner, unless L is
    its max_length.
    """
    tokens = batch["tokens"]
    if tokens.shape[1] != length:
        raise ValueError(f"{name}: {tokens.shape[1]} tokens a prompt, expected max_length={length}")
    return empty_where(drop, tokens, empty, pad_id)
