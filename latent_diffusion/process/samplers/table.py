"""The loop of all samplers, and the table of coefficients that defines a sampler.

Each evaluation of the network gives estimates of z_0 and eps at the current latent z. A row of the
table combines them with earlier estimates and with `base`, the latent at which the current step
started, into the next latent:

    base ← restart · z + keep · base + Σ_k correction_k · z_0[k]
    z    ← scale · base + Σ_k z_0_k · z_0[k] + Σ_k eps_k · eps[k] + noise · n,   n ~ N(0, 1)

where [k] is the estimate of k evaluations ago, and `dropout` zeroes a share of n. With `log_range`,
`noise` is the smallest amplitude, and each element's learned variance enlarges it. So the loop is a
single `lax.scan` that contains the network once, and a sampler is the formula of its coefficients,
vectorised over the steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import normal_per_example, split_per_example, uniform_per_example
from latent_diffusion.core.types import Array, Float, Keys, Number
from latent_diffusion.process.diffusion import Denoiser, variance_factor
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


def run(
    table: Table, denoise: Denoiser, z: Float[Array, "B *latent"], rng: Keys | None = None
) -> Float[Array, "B *latent"]:
    """Apply a table to the latent z. Image b's noise at row i depends only on rng[b] and i."""
    if table.noise is not None and rng is None:
        raise ValueError("this sampler draws noise: give it rng, one key per image")
    z = z.astype(jnp.float32)

    def evaluate(carry, row):
        (z, base, past_z_0, past_eps), (i, row) = carry, row
        pred = denoise(z, row.t)
        z_0, eps = _push(pred.z_0, past_z_0), _push(pred.eps, past_eps)
        base = _weighted((row.restart, z), (row.keep, base)) if table.restart is not None else z
        base = base + _combine(row.correction, z_0)
        z = _weighted((row.scale, base)) + _combine(row.z_0, z_0) + _combine(row.eps, eps)
        if row.noise is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(rng, i)
            noise = normal_per_example(keys, z.shape[1:])
            noise = noise if row.dropout is None else _drop(keys, noise, row.dropout)
            if row.log_range is not None:
                noise = jnp.sqrt(variance_factor(pred.variance, row.log_range)) * noise
            z = z + row.noise * noise
        return (z, base, z_0, eps), None

    start = (z, z, _memory(table.z_0, z), _memory(table.eps, z))
    rows = (jnp.arange(table.t.shape[0]), table)
    return jax.lax.scan(evaluate, start, rows)[0][0]


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
