"""Linear multistep methods (PLMS, LMS, DEIS, UniPC): a step also uses earlier evaluations."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, lookup
from latent_diffusion.process.samplers.integrals import (
    interpolation_weights,
    lagged,
    multistep_orders,
    past_nodes,
    phi,
    ratio,
)
from latent_diffusion.process.samplers.table import Levels, Table, along_rho, levels, steps
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps

# Adams–Bashforth on equal steps (Liu et al. 2022, eq. 12). Row 1 returns to the start with the mean
# of both ends (Heun); later rows skip its evaluation, which is not on the path.
_PLMS = (
    (1, 0, 0, 0, 0),
    (1 / 2, 1 / 2, 0, 0, 0),
    (3 / 2, 0, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 0, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, 0, -9 / 24),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24, 0),
)

# Adams–Bashforth on equal steps, by the number of earlier evaluations.
_ADAMS = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

# h -> half of UniPC's B(h), the weight of a slope in its lowest orders.
_HALF_B: dict[str, Callable[[Array], Array]] = {
    "bh1": lambda h: 0.5 * h,
    "bh2": lambda h: -0.5 * jnp.expm1(-h),
}


def plms(schedule: NoiseSchedule, timesteps: Timesteps, *, extrapolated: str = "eps") -> Table:
    """PLMS, or PNDM without Runge–Kutta (Liu et al. 2022): S + 1 evaluations, as in the original.

    extrapolated: "eps", or "v" as in diffusers for networks that predict v: v is then extrapolated
    from several evaluations, and gives eps with the z at the step's start.
    """
    count = len(timesteps) - 1
    all_levels = levels(schedule, timesteps)
    row = jnp.arange(count + 1)
    begin, end = jnp.maximum(row - 1, 0), jnp.maximum(row, 1)
    here, there = Levels(*(x[begin] for x in all_levels)), Levels(*(x[end] for x in all_levels))
    # The second evaluation is at the end of the first step, or at its start if there is one step.
    t = jnp.where((row == 1) & (count > 1), there.t, here.t)
    weights = jnp.asarray(_PLMS)[jnp.minimum(row, len(_PLMS) - 1)]
    span = (there.rho - here.rho)[:, None]
    scale, z_0, eps = along_rho(here, there, there.rho, span * weights)
    again = jnp.where(row == 1, 1.0, 0.0)
    if lookup({"eps": False, "v": True}, extrapolated, "extrapolated prediction"):
        evaluated = levels(schedule, t)
        alphas, sigmas = (
            jnp.stack([lagged(x, k) for k in range(eps.shape[1])], axis=1)
            for x in (evaluated.alpha, evaluated.sigma)
        )
        # With v = alpha eps − sigma z_0, eps = (alpha v + sigma z) / (alpha² + sigma²).
        weights = eps / (here.alpha**2 + here.sigma**2)[:, None]
        scale = scale + here.sigma * jnp.sum(weights, 1)
        v = here.alpha[:, None] * weights
        z_0, eps = z_0 - v * sigmas, v * alphas
    return Table(t, scale, z_0, eps, restart=1 - again, keep=again)


def ipndm(schedule: NoiseSchedule, timesteps: Timesteps) -> Table:
    """PLMS with first steps of lower order: one evaluation per step (Zhang & Chen 2023)."""
    here, there = steps(schedule, timesteps)
    span = (there.rho - here.rho)[:, None]
    weights = jnp.asarray(_ADAMS)[jnp.minimum(jnp.arange(len(span)), len(_ADAMS) - 1)]
    return Table(here.t, *along_rho(here, there, there.rho, span * weights))


def lms(schedule: NoiseSchedule, timesteps: Timesteps, *, order: int = 4) -> Table:
    """Adams–Bashforth on unequal steps: eps as a polynomial in sigma/alpha (k-diffusion)."""
    here, there = steps(schedule, timesteps)
    step = there.rho - here.rho
    nodes, usable = past_nodes(here.rho, step, jnp.asarray(order), order)
    moments = [jnp.full_like(step, 1 / (k + 1)) for k in range(order)]
    weights = step[:, None] * interpolation_weights(nodes, usable, moments)
    return Table(here.t, *along_rho(here, there, there.rho, weights))


def deis(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    order: int = 2,
    lower_order_final: bool = True,
) -> Table:
    """DEIS (Zhang & Chen 2023, tAB): eps as a polynomial in log-SNR, integrated exactly.

    order: up to 4; a step to clean data has order 1. lower_order_final: see `multistep_orders`.
    """
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    orders = multistep_orders(len(h), order, lower_order_final)
    nodes, usable = past_nodes(here.lam, h, jnp.where(there.t < 0, 1, orders), order)
    moments = [math.factorial(k) * jnp.exp(-h) * phi(k + 1, h) for k in range(order)]
    span = (-h * here.rho)[:, None]  # d rho = −rho d lam
    weights = span * interpolation_weights(nodes, usable, moments)
    return Table(here.t, *along_rho(here, there, there.rho, weights))


def unipc(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: tuple[int, ...] = (),
) -> Table:
    """UniPC on z_0 (Zhao et al. 2023, algorithms 5 and 6).

    Each evaluation first corrects the latent at which it was made, then predicts the next latent.
    order: the predictor's, up to 3; with `lower_order_final` it falls to 1 in the last steps.
    solver_type: "bh1" for B(h) = h, "bh2" for B(h) = e^h − 1. disable_corrector: steps, counted
    from 0, whose ends aren't corrected.
    """
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    row = jnp.arange(len(h))
    orders = jnp.minimum(order, row + 1)
    if lower_order_final:
        orders = jnp.minimum(orders, len(h) - row)
    half = lookup(_HALF_B, solver_type, "solver_type of unipc")
    predict = _predictor(here, h, orders, order, half)
    correct = _corrector(here, h, orders, order, half)
    free = (row == 0) | jnp.isin(row - 1, jnp.asarray(disable_corrector, jnp.int32))
    return Table(
        here.t,
        scale=there.sigma / here.sigma,
        z_0=there.alpha[:, None] * jnp.pad(predict, ((0, 0), (0, 1))),
        restart=jnp.where(free, 1.0, 0.0),
        keep=jnp.where(free, 0.0, here.sigma / lagged(here.sigma, 1)),
        correction=jnp.where(free[:, None], 0.0, here.alpha[:, None] * correct),
    )


def _predictor(
    here: Levels, h: Array, orders: Array, order: int, half: Callable[[Array], Array]
) -> Float[Array, "S K"]:
    """UniP: weights of z_0 here and before, relative to alpha there."""
    nodes, usable = past_nodes(here.lam, h, orders, order)
    exact = h[:, None] * interpolation_weights(nodes, usable, _data_moments(h, order))
    if order == 1:
        return exact
    # Order 2 replaces the exact weight of the slope by half of B(h): DPM-Solver++(2M).
    slope = half(h) * ratio(h, lagged(h, 1))
    simple = jnp.zeros_like(exact).at[:, 0].set(-jnp.expm1(-h) + slope).at[:, 1].set(-slope)
    return jnp.where((orders == 2)[:, None], simple, exact)


def _corrector(
    here: Levels, h: Array, orders: Array, order: int, half: Callable[[Array], Array]
) -> Float[Array, "S J"]:
    """UniC: weights of z_0 here, at the step's start and before it, relative to alpha here."""
    start, h, orders = lagged(here.lam, 1), lagged(h, 1), lagged(orders, 1)
    nodes, usable = past_nodes(start, h, orders, order)
    exists = [u & (jnp.arange(len(h)) > k) for k, u in enumerate(usable)]
    ones = jnp.ones_like(h)
    moments = _data_moments(h, order + 1)
    exact = h[:, None] * interpolation_weights([ones, *nodes], [ones > 0, *exists], moments)
    # Order 1 replaces the exact weight of the difference by half of B(h).
    slope = half(h)
    simple = jnp.zeros_like(exact).at[:, 0].set(slope).at[:, 1].set(-jnp.expm1(-h) - slope)
    return jnp.where((orders == 1)[:, None], simple, exact)


def _data_moments(h: Array, count: int) -> list[Array]:
    """∫_0^1 e^{−h(1−u)} u^k du."""
    return [math.factorial(k) * phi(k + 1, -h) for k in range(count)]
