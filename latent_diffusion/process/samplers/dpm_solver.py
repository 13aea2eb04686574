"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (2022b), one evaluation per step.

lam is log(alpha/sigma), and h the length of a step in lam. DPM-Solver extrapolates eps and
DPM-Solver++ z_0; their weights are the same functions of x, which is h for eps and −h for z_0.
Steps without enough earlier evaluations have a lower order, and so have the last: see `_orders`.
"""

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Int, Number, lookup
from latent_diffusion.process.samplers.integrals import lagged, multistep_orders, phi, ratio
from latent_diffusion.process.samplers.table import Levels, Table, along_rho, is_zero, steps
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps

# x -> the weight of the slope in a second-order step.
_SLOPE_WEIGHTS = {
    "midpoint": lambda x: -0.5 * jnp.expm1(x),
    "heun": lambda x: -x * phi(2, x),  # the exact integral of a linear prediction
}


def dpm_solver_2m(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Table:
    """DPM-Solver of second order, multistep: extrapolates eps over log-SNR."""
    return _noise_multistep(schedule, timesteps, 2, solver_type, lower_order_final, euler_at_final)


def dpm_solver_3m(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Table:
    """DPM-Solver of third order, multistep. solver_type: kind of its second-order steps."""
    return _noise_multistep(schedule, timesteps, 3, solver_type, lower_order_final, euler_at_final)


def dpm_solver_pp_2m(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Table:
    """DPM-Solver++(2M) (2022b, algorithm 2): extrapolates z_0 over log-SNR.

    solver_type: "midpoint", or "heun", which integrates the extrapolation exactly.
    """
    ends = (lower_order_final, euler_at_final)
    return _data_multistep(schedule, timesteps, 2, 0.0, solver_type, *ends)


def dpm_solver_pp_2m_sde(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    eta: Number = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Table:
    """SDE-DPM-Solver++(2M) (2022b, eq. 19). eta scales the noise; 0 is `dpm_solver_pp_2m`."""
    ends = (lower_order_final, euler_at_final)
    return _data_multistep(schedule, timesteps, 2, eta, solver_type, *ends)


def dpm_solver_pp_3m_sde(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    eta: Number = 1.0,
    solver_type: str = "heun",
    lower_order_final: bool = False,
    euler_at_final: bool = False,
) -> Table:
    """SDE-DPM-Solver++(3M) (k-diffusion). eta scales the noise.

    solver_type: kind of the second-order steps; diffusers has "midpoint".
    The second difference has the published weight, half of the weight that third order needs.
    """
    ends = (lower_order_final, euler_at_final)
    return _data_multistep(schedule, timesteps, 3, eta, solver_type, *ends)


def dpm_solver_pp_singlestep(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    order: int = 2,
    eta: Number = 0.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> Table:
    """DPM-Solver++(2S), or with `order` 3 (3S): groups of steps that begin at the group's start.

    The first step of a group is of first order; the others use the evaluations of their group. eta
    scales the noise. lower_order_final: whether the last step is of first order even if it
    completes a group and doesn't end at clean data.
    """
    weight = lookup(_SLOPE_WEIGHTS, solver_type, "solver_type")
    if not 1 <= order <= 3:
        raise ValueError(f"order={order} of dpm_solver_pp_singlestep must be 1, 2 or 3")
    here, there = steps(schedule, timesteps)
    row = jnp.arange(len(here.t))
    orders = row % order + 1
    completes = (row == len(row) - 1) & (orders == order) & lower_order_final
    orders = jnp.where(completes | (there.t < 0), 1, orders)
    past = [Levels(*(lagged(x, k) for x in here)) for k in range(3)]
    start = Levels(*(_by_order(orders, *fields) for fields in zip(*past, strict=True)))
    h = there.lam - start.lam
    x = -h * (1 + eta)
    whole = -jnp.expm1(x)
    to_here, to_middle = ratio(h, here.lam - start.lam), ratio(h, past[1].lam - start.lam)
    second = _columns(weight(x) * to_here, whole - weight(x) * to_here)
    far = _columns(to_here, 0.0, -to_here)  # slope from the group's start to here
    near = _columns(0.0, to_middle, -to_middle)  # slope from there to the evaluation between
    slope, curve = far, jnp.zeros_like(far)
    if solver_type == "heun":
        apart = (to_middle - to_here)[:, None]
        slope = ratio(near * to_middle[:, None] - far * to_here[:, None], apart)
        curve = 2 * ratio((far - near) * (to_here * to_middle)[:, None], apart)
    third = _columns(0.0 * whole, 0.0, whole) - (x * phi(2, x))[:, None] * slope
    third -= (x * phi(3, x))[:, None] * curve
    z_0 = _by_order(orders, _columns(whole, 0.0, 0.0), jnp.pad(second, ((0, 0), (0, 1))), third)
    table = _exponential(here, start, there, z_0[:, :order], eta)
    first = jnp.where(orders == 1, 1.0, 0.0)
    return table._replace(restart=first, keep=1 - first)


def _noise_multistep(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    order: int,
    solver_type: str,
    lower_order_final: bool,
    euler_at_final: bool,
) -> Table:
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    orders = _orders(there, order, lower_order_final, euler_at_final)
    weights = _multistep(h, h, orders, order, solver_type)
    rho = jnp.exp(-there.lam)  # slightly above 0 where h stands for infinity
    return Table(here.t, *along_rho(here, there, there.rho, rho[:, None] * weights))


def _data_multistep(
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    order: int,
    eta: Number,
    solver_type: str,
    lower_order_final: bool,
    euler_at_final: bool,
) -> Table:
    here, there = steps(schedule, timesteps)
    h = there.lam - here.lam
    orders = _orders(there, order, lower_order_final, euler_at_final)
    z_0 = _multistep(h, -h * (1 + eta), orders, order, solver_type)
    return _exponential(here, here, there, z_0, eta)


def _orders(
    there: Levels, order: int, lower_order_final: bool, euler_at_final: bool
) -> Int[Array, " S"]:
    """The order of each step; it is 1 in a last step to clean data, where h is infinite."""
    orders = multistep_orders(len(there.t), order, lower_order_final)
    last = jnp.arange(len(orders)) == len(orders) - 1
    return jnp.where(last & ((there.t < 0) | euler_at_final), 1, orders)


def _multistep(
    h: Array, x: Array, orders: Int[Array, " S"], count: int, solver_type: str
) -> Float[Array, "S K"]:
    """Weights of the latest `count` predictions, over alpha (of z_0) or sigma (of eps) there."""
    weight = lookup(_SLOPE_WEIGHTS, solver_type, "solver_type")
    h_1, h_2 = lagged(h, 1), lagged(h, 2)
    recent = _columns(ratio(h, h_1), -ratio(h, h_1), 0.0)
    before = _columns(0.0, ratio(h, h_2), -ratio(h, h_2))
    slope = recent + (recent - before) * ratio(h_1, h_1 + h_2)[:, None]
    curve = (recent - before) * ratio(h, h_1 + h_2)[:, None]
    second = weight(x)[:, None] * recent
    third = -(x * phi(2, x))[:, None] * slope - (x * phi(3, x))[:, None] * curve
    weights = _columns(-jnp.expm1(x), 0.0, 0.0)
    return (weights + _by_order(orders, jnp.zeros_like(second), second, third))[:, :count]


def _by_order(orders: Int[Array, " S"], first: Array, second: Array, third: Array) -> Array:
    """Each row from `first`, `second` or `third`, by the order of its step."""
    orders = orders.reshape(-1, *[1] * (first.ndim - 1))
    return jnp.where(orders == 1, first, jnp.where(orders == 2, second, third))


def _columns(*columns: Array | float) -> Float[Array, "S K"]:
    return jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, columns)), axis=1)


def _exponential(
    here: Levels, start: Levels, there: Levels, z_0: Float[Array, "S K"], eta: Number
) -> Table:
    """The exact solution of the linear part from `start`, and weights of z_0 relative to alpha."""
    h = there.lam - start.lam
    return Table(
        here.t,
        scale=there.sigma / start.sigma * jnp.exp(-eta * h),
        z_0=there.alpha[:, None] * z_0,
        noise=None if is_zero(eta) else there.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h)),
    )
