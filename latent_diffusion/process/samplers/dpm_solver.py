"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (2022b), one evaluation a step.

lam is log(alpha/sigma), h a step in it. Steps without enough past are of lower order; so is the
last one where it ends at clean data (h is infinite there) or the 2M methods have under 15 steps.
"""

import jax.numpy as jnp

from latent_diffusion.process.samplers.integrals import lagged, phi, ratio
from latent_diffusion.process.samplers.table import Levels, Table, is_zero, steps
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps
from latent_diffusion.types import Array, Bool, Float, Number, lookup

# h -> the weight of the slope of z_0 in a second-order step, over that of z_0's own −expm1(−h).
_SLOPE_WEIGHTS = {
    "midpoint": lambda h: -0.5 * jnp.expm1(-h),
    "heun": lambda h: h * phi(2, -h),  # the exact integral of a linear z_0
}


def dpm_solver_2m(schedule: NoiseSchedule, timesteps: Timesteps) -> Table:
    """DPM-Solver of second order, multistep: extrapolates eps over log-SNR."""
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    slope = jnp.where(_has_past(there, 1, few=15), 0.5 * ratio(h, lagged(h, 1)), 0.0)
    span = there.alpha * (there.rho - here.rho)
    return Table(
        here.t,
        scale=there.alpha / here.safe_alpha,
        eps=span[:, None] * jnp.stack([1 + slope, -slope], axis=1),
    )


def dpm_solver_pp_2m(
    schedule: NoiseSchedule, timesteps: Timesteps, *, solver_type: str = "midpoint"
) -> Table:
    """DPM-Solver++(2M) (2022b, algorithm 2): extrapolates z_0 over log-SNR.

    solver_type: "midpoint", or "heun", which integrates the extrapolation exactly.
    """
    return dpm_solver_pp_2m_sde(schedule, timesteps, eta=0.0, solver_type=solver_type)


def dpm_solver_pp_2m_sde(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    eta: Number = 1.0,
    solver_type: str = "midpoint",
) -> Table:
    """SDE-DPM-Solver++(2M) (2022b, eq. 19). eta scales the noise; 0 is `dpm_solver_pp_2m`."""
    weight = lookup(_SLOPE_WEIGHTS, solver_type, "solver_type")
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    slope = weight(h * (1 + eta)) * ratio(h, lagged(h, 1))
    slope = jnp.where(_has_past(there, 1, few=15), slope, 0.0)
    whole = -jnp.expm1(-h * (1 + eta))
    z_0 = jnp.stack([whole + slope, -slope], axis=1)
    return _exponential(here, there, z_0, eta)


def dpm_solver_pp_3m_sde(
    schedule: NoiseSchedule, timesteps: Timesteps, *, eta: Number = 1.0, solver_type: str = "heun"
) -> Table:
    """SDE-DPM-Solver++(3M) (k-diffusion). eta scales the noise.

    solver_type: of the second-order step before the past suffices; diffusers' is "midpoint".
    The second difference has the published weight, half of what third order would need.
    """
    weight = lookup(_SLOPE_WEIGHTS, solver_type, "solver_type")
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    h_1, h_2, h_eta = lagged(h, 1), lagged(h, 2), h * (1 + eta)

    def differences(*z_0: Array | float) -> Array:
        return jnp.stack([jnp.broadcast_to(x, h.shape) for x in z_0], axis=1)

    recent = differences(ratio(h, h_1), -ratio(h, h_1), 0.0)
    before = differences(0.0, ratio(h, h_2), -ratio(h, h_2))
    slope = recent + (recent - before) * ratio(h_1, h_1 + h_2)[:, None]
    curve = (recent - before) * ratio(h, h_1 + h_2)[:, None]
    third = (h_eta * phi(2, -h_eta))[:, None] * slope + (h_eta * phi(3, -h_eta))[:, None] * curve
    second = weight(h_eta)[:, None] * recent
    z_0 = differences(-jnp.expm1(-h_eta), 0.0, 0.0)
    z_0 += jnp.where(
        _has_past(there, 1)[:, None], jnp.where(_has_past(there, 2)[:, None], third, second), 0.0
    )
    return _exponential(here, there, z_0, eta)


def dpm_solver_pp_singlestep(schedule: NoiseSchedule, timesteps: Timesteps) -> Table:
    """DPM-Solver++(2S): pairs of steps, the first one straight, the second from the pair's start.

    The last step, and the last two of an even number, are straight.
    """
    here, there = steps(schedule, timesteps)
    start = Levels(*(lagged(x, 1) for x in here))
    row = jnp.arange(len(here.t))
    second = (row % 2 == 1) & (row < len(row) - 1)
    whole = -jnp.expm1(jnp.where(second, start.lam, here.lam) - there.lam)
    slope = 0.5 * whole * ratio(there.lam - start.lam, here.lam - start.lam)
    z_0 = jnp.where(
        second[:, None],
        jnp.stack([slope, whole - slope], axis=1),
        jnp.stack([whole, jnp.zeros_like(whole)], axis=1),
    )
    return Table(
        here.t,
        scale=there.sigma / jnp.where(second, start.sigma, here.sigma),
        z_0=there.alpha[:, None] * z_0,
        restart=jnp.where(second, 0.0, 1.0),
        keep=jnp.where(second, 1.0, 0.0),
    )


def _has_past(there: Levels, count: int, few: int = 0) -> Bool[Array, " S"]:
    """Steps with `count` predecessors, but the last where it is clean, or one of under `few`."""
    row = jnp.arange(len(there.t))
    final = (row == len(row) - 1) & ((there.t < 0) | (len(row) < few))
    return (row >= count) & ~final


def _exponential(here: Levels, there: Levels, z_0: Float[Array, "S K"], eta: Number) -> Table:
    """The exact solution of the linear part, and the weights of z_0 relative to alpha."""
    h = there.lam - here.lam
    return Table(
        here.t,
        scale=there.sigma / here.sigma * jnp.exp(-eta * h),
        z_0=there.alpha[:, None] * z_0,
        noise=None if is_zero(eta) else there.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h)),
    )
