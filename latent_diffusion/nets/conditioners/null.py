"""Null conditions that aren't learned: zeros, or the empty prompt for texts."""

from collections.abc import Sequence

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Float, Int


def zeros_where(drop: Bool[Array, " B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Replace x by zeros in the examples that are dropped."""
    return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)


def empty_where(
    drop: Bool[Array, " B"], tokens: Int[Array, "B L"], empty: Sequence[int], pad_id: int
) -> Int[Array, "B L"]:
    """Replace tokens by the empty prompt in the examples that are dropped.

    empty: the tokens of the empty prompt before its padding, e.g. begin and end. Raises ValueError
    if there are more than L.
    """
    row = [*empty, *[pad_id] * (tokens.shape[1] - len(empty))]
    if len(row) != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens a prompt have no room for empty={tuple(empty)}")
    return jnp.where(drop[:, None], jnp.array(row, tokens.dtype), tokens)


def prompts(
    name: str, batch: Batch, drop: Bool[Array, " B"], length: int, empty: Sequence[int], pad_id: int
) -> Int[Array, "B L"]:
    """`empty_where` of the batch's `tokens`; ValueError unless their number L is `length`.

    name: the conditioner, for the error message.
    """
    tokens = batch["tokens"]
    if tokens.shape[1] != length:
        raise ValueError(f"{name}: {tokens.shape[1]} tokens a prompt, expected max_length={length}")
    return empty_where(drop, tokens, empty, pad_id)
