"""Consistency models: f(z_t, t) jumps to the start of the path on which z_t lies.

Song et al. 2023; for latents, Luo et al. 2023, whose constants are the defaults here.
"""

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Number
from latent_diffusion.process.diffusion import Prediction, expand
from latent_diffusion.process.schedules import NoiseSchedule, Timestep


def boundary(
    t: Timestep, timestep_scaling: Number = 10.0, sigma_data: Number = 0.5
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The factors (skip, out) of z_t and of the estimate of z_0 in f(z_t, t); (1, 0) at t = 0."""
    scaled = t * timestep_scaling
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    return skip, scaled / jnp.sqrt(scaled**2 + sigma_data**2)


def consistent(
    z_0: Float[Array, "B ..."], z_t: Float[Array, "B ..."], t: Timestep
) -> Float[Array, "B ..."]:
    """f(z_t, t) of an estimate of z_0 at timesteps t [B]."""
    skip, out = boundary(t)
    return expand(skip, z_t) * z_t + expand(out, z_t) * z_0


def step(schedule: NoiseSchedule, estimate: Prediction, t: Timestep) -> Float[Array, "B ..."]:
    """Deterministic DDIM (Song et al. 2021, eq. 12) from an estimate to timesteps t [B]."""
    z_0, eps, _ = estimate
    return expand(schedule.alpha_t(t), z_0) * z_0 + expand(schedule.sigma_t(t), eps) * eps
