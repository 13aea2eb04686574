"""Noise on a condition: how much, and which (Ho et al. 2021, section 4.2)."""

import jax

from latent_diffusion.rng import normal_per_example, split_per_example
from latent_diffusion.types import Array, Batch, Keys


def level_and_noise(
    name: str, batch: Batch, rng: Keys | None, end: int, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """The batch's `noise_level` [B], or one drawn from [0, end); and noise [B *shape].

    Raises ValueError, in the conditioner's `name`, without a key for each example.
    """
    if rng is None:
        raise ValueError(f"{name}: noise needs a key for each example")
    k_level, k_noise = split_per_example(rng, 2)
    level = batch.get("noise_level")
    if level is None:
        level = jax.vmap(lambda key: jax.random.randint(key, (), 0, end))(k_level)
    return level, normal_per_example(k_noise, shape)
