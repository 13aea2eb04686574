"""The null condition of everything that isn't learned: zeros."""

import jax.numpy as jnp

from latent_diffusion.types import Array, Bool, Float


def zeros_where(drop: Bool[Array, " B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """x, with zeros for the examples that are dropped."""
    return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
