"""The loop of all samplers, and the table of coefficients that defines a sampler.

Each evaluation of the network gives estimates of z_0 and eps at the current latent z. A row of the
table combines them with earlier estimates and with `base`, the latent at which the current step
started, into the next latent:

    base ← restart · z + keep · base + Σ_k correction_k · z_0[k]
    z    ← scale · base + Σ_k z_0_k · z_0[k] + Σ_k eps_k · eps[k] + noise · n,   n ~ N(0, 1)

where [k] is the estimate of k evaluations ago, and `dropout` zeroes a share of n. With `log_range`,
`noise` is the smallest amplitude, and each element's learned variance enlarges it. So the loop is
a single one that contains the network once, and a sampler is the formula of its coefficients,
vectorised over the steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import normal_per_example, split_per_example, uniform_per_example
from latent_diffusion.core.types import Array, Float, Keys, Number
from latent_diffusion.process.diffusion import Denoiser, variance_factor
from latent_diffusion.process.samplers.integrals import ratio
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps

_CLEAN_LAM = 50.0  # for clean data, where it is infinite; exp(−50) is negligible beside 1


class Levels(NamedTuple):
    """Noise levels, one entry per step."""

    t: Array
    alpha: Array
    sigma: Array
    lam: Array  # log(alpha/sigma)
    rho: Array  # sigma/alpha, the "sigma" of Karras et al. 2022

    @property
    def safe_alpha(self) -> Array:
        """Alpha as a divisor: instead of 0, a positive number from the finite log-SNR."""
        return jnp.hypot(self.alpha, self.sigma) / jnp.sqrt(1 + self.rho**2)


def levels(schedule: NoiseSchedule, t: Array) -> Levels:
    """The noise levels of timesteps t (−1 is clean data)."""
    t = jnp.asarray(t, jnp.float32)
    lam = jnp.minimum(0.5 * schedule.log_snr_t(t), _CLEAN_LAM)
    rho = jnp.where(t < 0, 0.0, jnp.exp(-lam))
    return Levels(t, schedule.alpha_t(t), schedule.sigma_t(t), lam, rho)


def steps(schedule: NoiseSchedule, timesteps: Timesteps) -> tuple[Levels, Levels]:
    """The levels at the starts of the S steps, and at their ends."""
    return levels(schedule, timesteps[:-1]), levels(schedule, timesteps[1:])


class Table(NamedTuple):
    """Coefficients of N evaluations (see the module's docstring); None stands for zeros.

    t: timesteps of the evaluations. restart: None stands for ones: each evaluation starts a step.
    z_0, eps, correction: the latest estimate comes first.
    """

    t: Float[Array, " N"]
    scale: Float[Array, " N"] | None = None
    z_0: Float[Array, "N K"] | None = None
    eps: Float[Array, "N K"] | None = None
    noise: Float[Array, " N"] | None = None
    restart: Float[Array, " N"] | None = None
    keep: Float[Array, " N"] | None = None
    correction: Float[Array, "N K"] | None = None
    dropout: Float[Array, " N"] | None = None
    log_range: Float[Array, " N"] | None = None


def along_rho(
    here: Levels, there: Levels, end: Array, eps: Float[Array, "S K"]
) -> tuple[Float[Array, " S"], Float[Array, "S K"], Float[Array, "S K"]]:
    """The columns `scale`, `z_0` and `eps` of steps to rho = `end` at the level `there`.

    eps: weights of the estimates in the integral of eps over rho, since d(z/alpha)/d(rho) is eps.
    From pure noise, where rho is infinite, a step goes along 1/rho instead: d(z/sigma)/d(1/rho) is
    z_0, of which the estimates have the same shares.
    """
    pure = here.alpha == 0
    shares = ratio(eps, jnp.sum(eps, 1, keepdims=True))
    return (
        jnp.where(pure, there.safe_alpha * end / here.sigma, there.alpha / here.safe_alpha),
        jnp.where(pure[:, None], there.alpha[:, None] * shares, 0.0),
        jnp.where(pure[:, None], 0.0, there.alpha[:, None] * eps),
    )


class State(NamedTuple):
    """A sampling between two evaluations: the index i of the next, and the latents of the formula.

    seen: the latest estimate of z_0, for previews. z_0, eps: the earlier estimates that the table
    uses, the latest first.
    """

    i: Array
    z: Array
    base: Array
    seen: Array
    z_0: tuple[Array, ...]
    eps: tuple[Array, ...]


def start(table: Table, z: Float[Array, "B *latent"]) -> State:
    """The state before the first evaluation, at the latent z."""
    z = z.astype(jnp.float32)
    return State(jnp.int32(0), z, z, z, _memory(table.z_0, z), _memory(table.eps, z))


def advance(table: Table, state: State, denoise: Denoiser, rng: Keys | None = None) -> State:
    """The state after the next evaluation."""
    row = jax.tree.map(lambda x: x[state.i], table)
    pred = denoise(state.z, row.t)
    z_0, eps = _push(pred.z_0, state.z_0), _push(pred.eps, state.eps)
    base: Any = state.z
    if row.restart is not None:
        base = _weighted((row.restart, state.z), (row.keep, state.base))
    base = base + _combine(row.correction, z_0)
    z: Any = _weighted((row.scale, base)) + _combine(row.z_0, z_0) + _combine(row.eps, eps)
    if row.noise is not None:
        if rng is None:
            raise ValueError("this sampler draws noise: give it rng, one key per image")
        keys = jax.vmap(jax.random.fold_in, (0, None))(rng, state.i)
        noise = normal_per_example(keys, z.shape[1:])
        noise = noise if row.dropout is None else _drop(keys, noise, row.dropout)
        if row.log_range is not None:
            variance: Any = pred.variance
            noise = jnp.sqrt(variance_factor(variance, row.log_range)) * noise
        z = z + row.noise * noise
    return State(state.i + 1, z, base, pred.z_0, z_0, eps)


def advance_until(
    table: Table, state: State, stop: Array, denoise: Denoiser, rng: Keys | None = None
) -> State:
    """The state before evaluation `stop`.

    The compiler doesn't learn `stop`, so it makes the same loop for one evaluation as for all of
    them: a sampling in parts has bit for bit the result of a sampling in one program.
    """
    stop = jax.lax.optimization_barrier(stop)
    return jax.lax.while_loop(
        lambda state: state.i < stop, lambda state: advance(table, state, denoise, rng), state
    )


def run(
    table: Table, denoise: Denoiser, z: Float[Array, "B *latent"], rng: Keys | None = None
) -> Float[Array, "B *latent"]:
    """Apply a table to the latent z. Image b's noise at row i depends only on rng[b] and i."""

    def step(state: State, _: None) -> tuple[State, None]:
        return advance(table, state, denoise, rng), None

    return jax.lax.scan(step, start(table, z), length=len(table.t))[0].z


def _drop(keys: Keys, noise: Array, share: Array) -> Array:
    """Inverted dropout: a `share` of the elements is 0, the others are divided by 1 − share."""
    stays = uniform_per_example(split_per_example(keys, 1)[0], noise.shape[1:]) >= share
    return jnp.where(stays, noise / (1 - share), 0.0)


def _memory(coefficients: Array | None, z: Array) -> tuple[Array, ...]:
    count = 0 if coefficients is None else coefficients.shape[1]
    return (jnp.zeros_like(z),) * count


def _push(latest: Array, past: tuple[Array, ...]) -> tuple[Array, ...]:
    return (latest, *past)[: len(past)]


def _combine(coefficients: Array | None, estimates: tuple[Array, ...]) -> Array | float:
    if coefficients is None:
        return 0.0
    return _weighted(*((coefficients[k], estimates[k]) for k in range(len(coefficients))))


def _weighted(*terms: tuple[Array | None, Array]) -> Array | float:
    return sum((weight * x for weight, x in terms if weight is not None), start=0.0)


def is_zero(number: Number) -> bool:
    """Whether a number is certainly 0; a traced input of a program may have any value."""
    return not isinstance(number, jax.core.Tracer) and bool(number == 0)
