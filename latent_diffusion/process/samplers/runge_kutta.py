"""Methods with two evaluations per step: the second is at the point to which the first leads.

The last step has one evaluation, so S steps cost 2S − 1. rho is sigma/alpha: d(z/alpha)/d(rho) is
eps.
"""

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Number
from latent_diffusion.process.samplers.integrals import ratio
from latent_diffusion.process.samplers.table import Levels, Table, along_rho, is_zero, levels, steps
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps


def heun(schedule: NoiseSchedule, timesteps: Timesteps) -> Table:
    """Heun's second-order method (Karras et al. 2022, algorithm 1)."""
    here, there = steps(schedule, timesteps)
    half = 0.5 * (there.rho - here.rho)
    columns = along_rho(here, there, there.rho, jnp.stack([half, half], axis=1))
    return _two_stages(here, there, there, there.rho, *columns)


def dpm2(schedule: NoiseSchedule, timesteps: Timesteps) -> Table:
    """The midpoint method with the midpoint of log-SNR (k-diffusion, after DPM-Solver-2)."""
    return dpm2_ancestral(schedule, timesteps, eta=0.0)


def dpm2_ancestral(schedule: NoiseSchedule, timesteps: Timesteps, *, eta: Number = 1.0) -> Table:
    """`dpm2` down to a lower noise level, then fresh noise (k-diffusion)."""
    here, there = steps(schedule, timesteps)
    down, up = _ancestral(here, there, eta)
    middle = _middle(schedule, here, down)
    columns = along_rho(here, there, down, (down - here.rho)[:, None])
    return _two_stages(here, middle, there, down, *columns, up=None if is_zero(eta) else up)


def dpm_solver_pp_2s_ancestral(
    schedule: NoiseSchedule, timesteps: Timesteps, *, eta: Number = 1.0
) -> Table:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), then fresh noise (k-diffusion)."""
    here, there = steps(schedule, timesteps)
    down, up = _ancestral(here, there, eta)
    middle = _middle(schedule, here, down)
    z_0 = (there.alpha * (1 - down / here.rho))[:, None]
    scale = there.alpha * down / here.sigma
    return _two_stages(
        here, middle, there, down, scale, z_0, jnp.zeros_like(z_0), None if is_zero(eta) else up
    )


def dpm_solver_pp_sde(schedule: NoiseSchedule, timesteps: Timesteps, *, eta: Number = 1.0) -> Table:
    """SDE-DPM-Solver++ of two stages, along one Brownian path (k-diffusion's DPM++ SDE).

    The path is a function of rho: the noise of a step is the noise of its first stage, which is in
    the middle latent, and a further part.
    """
    here, there = steps(schedule, timesteps)
    last = jnp.arange(len(here.t)) == len(here.t) - 1
    between = _middle(schedule, here, there.rho)
    middle = Levels(*(jnp.where(last, *x) for x in zip(there, between, strict=True)))
    down_1, up_1 = _ancestral(here, middle, eta)
    down, up = _ancestral(here, there, eta)
    first_scale, scale = middle.alpha * down_1 / here.sigma, there.alpha * down / here.sigma
    first_z_0 = middle.alpha * (1 - down_1 / here.rho)
    z_0 = there.alpha * (1 - down / here.rho)
    share = ratio(here.rho - middle.rho, here.rho - there.rho)  # of the variance
    again = ratio(there.alpha * up * jnp.sqrt(share), middle.alpha * up_1)
    first = Table(
        here.t,
        scale=first_scale,
        z_0=jnp.stack([first_z_0, 0.0 * z_0], axis=1),
        noise=None if is_zero(eta) else middle.alpha * up_1,
        restart=jnp.ones_like(scale),
        keep=jnp.zeros_like(scale),
    )
    second = Table(
        middle.t,
        scale=jnp.ones_like(scale),
        z_0=jnp.stack([z_0, -again * first_z_0], axis=1),
        noise=None if is_zero(eta) else there.alpha * up * jnp.sqrt(1 - share),
        restart=again,
        keep=scale - again * first_scale,
    )
    return _interleave(first, second)


def _middle(schedule: NoiseSchedule, here: Levels, down: Array) -> Levels:
    """The levels in the middle of log-SNR between a step's start and rho = `down`."""
    rho = jnp.sqrt(here.rho * down)
    return levels(schedule, schedule.timestep_at(-2 * jnp.log(rho)))


def _ancestral(here: Levels, there: Levels, eta: Number) -> tuple[Array, Array]:
    """Split a step to `there`: a deterministic step down to a lower rho, and fresh noise up."""
    up = jnp.minimum(1.0, eta * jnp.sqrt(-jnp.expm1(2 * (here.lam - there.lam))))
    return there.rho * jnp.sqrt(1 - up**2), there.rho * up


def _two_stages(
    here: Levels,
    middle: Levels,
    there: Levels,
    down: Array,
    scale: Array,
    z_0: Float[Array, "S K"],
    eps: Float[Array, "S K"],
    up: Array | None = None,
) -> Table:
    """A first-order step to `middle`, then from the start to rho = `down`, then noise `up`.

    scale, z_0, eps: the second stage. The last step is of first order, without a second stage.
    """
    zeros, ones = jnp.zeros_like(scale), jnp.ones_like(scale)

    def columns(latest: Array) -> Array:
        return jnp.zeros_like(z_0).at[:, 0].set(latest)

    noise = None if up is None else there.alpha * up
    last = jnp.arange(len(scale)) == len(scale) - 1
    first = Table(
        here.t,
        scale=zeros,
        z_0=columns(jnp.where(last, there.alpha, middle.alpha)),
        eps=columns(jnp.where(last, there.alpha * down, middle.sigma)),
        noise=None if noise is None else jnp.where(last, noise, 0.0),
        restart=ones,
        keep=zeros,
    )
    second = Table(middle.t, scale, z_0, eps, noise, zeros, ones)
    return _interleave(first, second)


def _interleave(first: Table, second: Table) -> Table:
    """The rows of both stages in turn, without the second stage of the last step."""
    return jax.tree.map(
        lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])[:-1], first, second
    )
