"""Null conditions: zeros for what isn't learned, the empty prompt for texts."""

from collections.abc import Sequence

import jax.numpy as jnp

from latent_diffusion.types import Array, Bool, Float, Int


def zeros_where(drop: Bool[Array, " B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """x, with zeros for the examples that are dropped."""
    return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)


def empty_where(
    drop: Bool[Array, " B"], tokens: Int[Array, "B L"], empty: Sequence[int], pad_id: int
) -> Int[Array, "B L"]:
    """tokens, with the empty prompt for the examples that are dropped.

    empty: its tokens before the padding, e.g. those of begin and end.
    """
    row = [*empty, *[pad_id] * (tokens.shape[1] - len(empty))]
    if len(row) != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens a prompt have no room for empty={tuple(empty)}")
    return jnp.where(drop[:, None], jnp.array(row, tokens.dtype), tokens)
