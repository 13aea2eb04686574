"""Samplers with one evaluation per step, of first order: DDPM, DDIM, Euler, consistency models."""

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Number
from latent_diffusion.process.consistency import boundary
from latent_diffusion.process.diffusion import Denoiser
from latent_diffusion.process.samplers.table import Levels, Table, is_zero, levels, run, steps
from latent_diffusion.process.schedules import CLEAN, NoiseSchedule, Timesteps


def ddpm(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    large_variance: Number = 0.0,
    temperature: Number = 1.0,
    learned_variance: bool = False,
) -> Table:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over any subset of the timesteps.

    large_variance: 0 takes the posterior variance, 1 takes beta_t, and values between mix them
    (LDM's v_posterior). temperature: a factor of the noise. learned_variance: each element has the
    variance between the two that `Prediction.variance` gives (Nichol & Dhariwal 2021, eq. 15).
    """
    here, there = steps(schedule, timesteps)
    lost = -jnp.expm1(2 * (here.lam - there.lam))  # 1 − SNR_t / SNR_s
    small, large = there.sigma**2 * lost, here.sigma**2 * lost
    large = jnp.where(there.t < 0, 0.0, large)  # the final result gets no noise
    variance = (1 - large_variance) * small + large_variance * large
    return Table(
        here.t,
        scale=here.alpha / there.alpha * there.sigma**2 / here.sigma**2,
        z_0=(there.alpha * lost)[:, None],
        noise=temperature * jnp.sqrt(variance),
        log_range=jnp.where(there.t < 0, 0.0, 2 * jnp.log(here.sigma / there.sigma))
        if learned_variance
        else None,
    )


def ddim(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    eta: Number = 0.0,
    temperature: Number = 1.0,
    noise_dropout: Number = 0.0,
) -> Table:
    """DDIM (Song et al. 2021, eq. 12). eta: 0 is deterministic, 1 has DDPM's noise.

    temperature: a factor of the noise. noise_dropout: the share of the noise, in [0, 1), that is
    set to 0; ValueError for another value.
    """
    here, there = steps(schedule, timesteps)
    noise = ddim_noise(here, there, eta)
    return Table(
        here.t,
        z_0=there.alpha[:, None],
        eps=jnp.sqrt(jnp.maximum(there.sigma**2 - noise**2, 0.0))[:, None],
        noise=None if is_zero(eta) else temperature * noise,
        dropout=None if is_zero(noise_dropout) else jnp.full_like(noise, noise_dropout),
    )


def ddim_noise(here: Levels, there: Levels, eta: Number = 1.0) -> Float[Array, " S"]:
    """DDIM's sigma (eq. 16): the amplitude of the fresh noise, at most all noise of the level."""
    share = eta * jnp.sqrt(-jnp.expm1(2 * (here.lam - there.lam)))
    return there.sigma * jnp.minimum(share, 1.0)


def ddim_inversion(
    denoise: Denoiser,
    z_0: Float[Array, "B *latent"],
    timesteps: Timesteps,
    schedule: NoiseSchedule,
) -> Float[Array, "B *latent"]:
    """The latent at timesteps[0] from which deterministic DDIM leads (nearly) back to z_0.

    timesteps: those of the sampler, descending. The network is evaluated at the timestep where a
    step ends, since the first step starts from clean data (or ᾱ_0), which has no timestep.
    """
    here, there = steps(schedule, timesteps[::-1])
    scale = there.alpha / here.alpha
    eps = there.sigma - scale * here.sigma
    return run(Table(there.t, scale=scale, eps=eps[:, None]), denoise, z_0)


def euler(schedule: NoiseSchedule, timesteps: Timesteps) -> Table:
    """Euler's method for d(z/alpha)/d(sigma/alpha) = eps (Karras et al. 2022).

    In exact arithmetic this is deterministic DDIM, whose formula is better conditioned.
    """
    return ddim(schedule, timesteps)


def euler_ancestral(schedule: NoiseSchedule, timesteps: Timesteps, *, eta: Number = 1.0) -> Table:
    """Euler's step to below the next noise level, then fresh noise (k-diffusion): DDIM, eta 1."""
    return ddim(schedule, timesteps, eta=eta)


def lcm(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    timestep_scaling: Number = 10.0,
    sigma_data: Number = 0.5,
) -> Table:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): denoise, then noise again.

    It is for networks that are distilled to predict z_0 in one step; their boundary condition, with
    timestep_scaling and sigma_data, mixes the input into z_0. The last step adds no noise.
    """
    here, there = steps(schedule, timesteps)
    skip, out = boundary(here.t, timestep_scaling, sigma_data)
    return Table(
        here.t,
        scale=there.alpha * skip,
        z_0=(there.alpha * out)[:, None],
        noise=there.sigma.at[-1].set(0.0),
    )


def tcd(schedule: NoiseSchedule, timesteps: Timesteps, *, eta: Number = 0.3) -> Table:
    """Strategic stochastic sampling of trajectory consistency (Zheng et al. 2024, algorithm 4).

    For the next timestep t, each step goes directly to s = (1 − eta) t, then fresh noise leads up
    to t; eta is the paper's gamma, and 0 is deterministic. The last step adds no noise.
    """
    here, there = steps(schedule, timesteps)
    below = levels(schedule, jnp.where(there.t < 0, CLEAN, jnp.floor((1 - eta) * there.t)))
    up = there.alpha / below.alpha
    noise = jnp.sqrt(jnp.maximum(there.sigma**2 - (up * below.sigma) ** 2, 0.0))
    last = jnp.arange(len(noise)) == len(noise) - 1
    up, noise = jnp.where(last, 1.0, up), jnp.where(last, 0.0, noise)
    return Table(
        here.t,
        z_0=(up * below.alpha)[:, None],
        eps=(up * below.sigma)[:, None],
        noise=None if is_zero(eta) else noise,
    )
