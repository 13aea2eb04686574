"""The variational bound that trains the predicted variance (Nichol & Dhariwal 2021, §3.1)."""

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Int
from latent_diffusion.process import objectives
from latent_diffusion.process.diffusion import expand, to_z_0_and_eps, variance_factor
from latent_diffusion.process.schedules import NoiseSchedule

_BIN = 1 / 255  # half a bin: values in [−1, 1] are rounded to 256 levels


def bound(
    schedule: NoiseSchedule,
    kind: str,
    pred: Float[Array, "B h w c"],
    variance: Float[Array, "B h w c"],
    z_0: Float[Array, "B h w c"],
    z_t: Float[Array, "B h w c"],
    t: Int[Array, " B"],
) -> Float[Array, " B"]:
    """The term of timestep t of the variational bound, in bits per dimension.

    It is the KL divergence of a sampling step from the true posterior, and at t = 0 the negative
    log-likelihood of z_0 among 256 levels (also for latents, as in DiT's code). It trains only the
    variance: pred, which gives the step's mean, gets no gradient.
    """
    levels = schedule.alpha_t(t), schedule.sigma_t(t)
    mean = to_z_0_and_eps(kind, jax.lax.stop_gradient(pred), *levels, z_t).z_0
    log_sigma = 2 * jnp.log(schedule.sigmas)
    larger = variance_factor(variance, expand(jnp.diff(log_sigma, prepend=log_sigma[:1])[t], z_0))
    lost = objectives.elbo(schedule, "x0")[t]
    kl = (jnp.log(larger) - 1 + 1 / larger) / 2 + expand(lost, z_0) * (mean - z_0) ** 2 / larger
    smallest, largest = objectives.posterior_variance(schedule)[1], schedule.betas[0]
    spread = jnp.sqrt(smallest * variance_factor(variance, jnp.log(largest / smallest)))
    nats = jnp.where(expand(t == 0, z_0), _surprise(z_0, mean, spread), kl)
    return jnp.mean(nats.reshape(len(t), -1), axis=1) / jnp.log(2.0)


def _surprise(x: Array, mean: Array, spread: Array) -> Array:
    """−log of a normal distribution's mass in the bin of x; the outer bins include the tails."""
    below, above = (jax.scipy.stats.norm.cdf((x - mean + side * _BIN) / spread) for side in (-1, 1))
    share = jnp.where(x > 0.999, 1 - below, jnp.where(x < -0.999, above, above - below))
    return -jnp.log(jnp.maximum(share, 1e-12))
