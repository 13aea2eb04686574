"""The objective of latent denoising: errors, their weights, random timesteps and noise.

Weights are arrays [T], factors of the error of the predicted quantity, whichever that is.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import normal_per_example, uniform_per_example
from latent_diffusion.core.types import Array, Float, Int, Keys, lookup
from latent_diffusion.process.diffusion import PREDICTIONS
from latent_diffusion.process.schedules import NoiseSchedule
from latent_diffusion.process.spacings import shifted


def l1(pred: Float[Array, "B ..."], target: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Mean absolute error of each example."""
    return jnp.mean(jnp.abs(pred - target).reshape(pred.shape[0], -1), axis=1)


def l2(pred: Float[Array, "B ..."], target: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Mean squared error of each example."""
    return jnp.mean(jnp.square(pred - target).reshape(pred.shape[0], -1), axis=1)


def pseudo_huber(
    pred: Float[Array, "B ..."], target: Float[Array, "B ..."], c: float = 1e-3
) -> Float[Array, " B"]:
    """Mean of √(error² + c²) − c of each example: squared below c, absolute above it."""
    error = jnp.sqrt(jnp.square(pred - target) + c**2) - c
    return jnp.mean(error.reshape(pred.shape[0], -1), axis=1)


LOSSES: dict[str, Callable[..., Array]] = {"l1": l1, "l2": l2, "pseudo_huber": pseudo_huber}


def make_loss(name: str, huber_c: float) -> Callable[[Array, Array], Array]:
    """The loss `name` of LOSSES. huber_c: c of pseudo_huber."""
    loss = lookup(LOSSES, name, "loss")
    return functools.partial(loss, c=huber_c) if loss is pseudo_huber else loss


def _signal_in_error(schedule: NoiseSchedule, kind: str) -> Array:
    """(squared error in z_0) · SNR / (squared error of the prediction), for every t."""
    share = jax.nn.sigmoid(schedule.log_snr)  # ᾱ_t, positive even where alpha is 0
    alphas = jnp.hypot(schedule.alphas, schedule.sigmas) * jnp.sqrt(share)
    a, b = lookup(PREDICTIONS, kind, "prediction type")(alphas, schedule.sigmas)
    return jnp.square(alphas / (alphas * b - schedule.sigmas * a))


def simple(schedule: NoiseSchedule, kind: str) -> Float[Array, " T"]:
    """Weight 1 everywhere: L_simple (Ho et al. 2020, eq. 14)."""
    return jnp.ones_like(schedule.alphas)


def elbo(schedule: NoiseSchedule, kind: str) -> Float[Array, " T"]:
    """The variational bound: ½ (SNR(t−1) − SNR(t)) in z_0 (Kingma et al. 2021, eq. 15)."""
    betas = schedule.betas[1:]
    growth = betas / ((1 - betas) * _noise_share(schedule)[:-1])  # SNR(t−1) / SNR(t) − 1
    weights = 0.5 * growth * _signal_in_error(schedule, kind)[1:]
    return jnp.append(weights[0], weights)  # LDM replaces the infinite weight of t = 0


def elbo_original(
    schedule: NoiseSchedule, kind: str, v_posterior: float = 0.0
) -> Float[Array, " T"]:
    """LDM's lvlb_weights, with LDM's slip for "x0" (2 − ᾱ for 2(1 − ᾱ)); 1 for v and flow."""
    variance = posterior_variance(schedule, v_posterior)[1:]
    betas, alpha_bar = schedule.betas[1:], schedule.alphas_cumprod[1:]
    if kind == "eps":
        weights = betas**2 / (2 * variance * (1 - betas) * _noise_share(schedule)[1:])
    elif kind == "x0":
        weights = 0.5 * jnp.sqrt(alpha_bar) / (2 - alpha_bar)
    else:
        weights = jnp.ones_like(betas)
    return jnp.append(weights[0], weights)


def min_snr(schedule: NoiseSchedule, kind: str, gamma: float = 5.0) -> Float[Array, " T"]:
    """min(SNR, gamma) on the error in z_0, whatever the network predicts (Hang et al. 2023)."""
    bounded = jnp.minimum(1.0, gamma * jnp.exp(-schedule.log_snr))  # min(SNR, gamma) / SNR
    return bounded * _signal_in_error(schedule, kind)


LOSS_WEIGHTS: dict[str, Callable[..., Array]] = {
    "simple": simple,
    "elbo": elbo,
    "elbo_original": elbo_original,
    "min_snr": min_snr,
}


def posterior_variance(schedule: NoiseSchedule, v_posterior: float = 0.0) -> Float[Array, " T"]:
    """Variance of q(z_{t−1} | z_t, z_0), mixed with beta_t by v_posterior in [0, 1]."""
    noise = _noise_share(schedule)
    small = schedule.betas * jnp.append(0.0, noise[:-1]) / noise
    return (1 - v_posterior) * small + v_posterior * schedule.betas


def _noise_share(schedule: NoiseSchedule) -> Array:
    """1 − ᾱ_t of every t, computed without cancellation."""
    return schedule.sigmas**2 / (schedule.alphas**2 + schedule.sigmas**2)


def weigh_by_logvar(loss: Float[Array, " B"], logvar_t: Float[Array, " B"]) -> Float[Array, " B"]:
    """Loss under a learned log-variance of the timestep: loss / exp(logvar_t) + logvar_t (LDM)."""
    return loss / jnp.exp(logvar_t) + logvar_t


def uniform(keys: Keys, schedule: NoiseSchedule) -> Int[Array, " B"]:
    """Every timestep equally often."""
    return _below(uniform_per_example(keys) * schedule.num_timesteps, schedule)


def logit_normal(
    keys: Keys, schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0
) -> Int[Array, " B"]:
    """T · sigmoid(N(mean, std²)): the middle more often (Esser et al. 2024, §3.1)."""
    share = jax.nn.sigmoid(mean + std * normal_per_example(keys, ()))
    return _below(share * schedule.num_timesteps, schedule)


def mode(keys: Keys, schedule: NoiseSchedule, scale: float = 1.29) -> Int[Array, " B"]:
    """T · f(u), u uniform: the middle more often, but also the ends (Esser et al. 2024, §3.1).

    f(u) = 1 − u − scale · (cos²(πu/2) − 1 + u).
    """
    u = uniform_per_example(keys)
    share = 1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)
    return _below(share * schedule.num_timesteps, schedule)


def importance(
    keys: Keys, schedule: NoiseSchedule, density: Float[Array, " T"] | None = None
) -> Int[Array, " B"]:
    """Timesteps in proportion to `density` (unnormalised); None: evenly over log-SNR.

    `importance_weights(density)` keeps the loss unbiased; `loss_density` follows the loss.
    """
    if density is None:
        density = -jnp.diff(schedule.log_snr, prepend=schedule.log_snr[0])
    cumulative = jnp.cumsum(density)
    drawn = uniform_per_example(keys) * cumulative[-1]
    return _below(jnp.searchsorted(cumulative, drawn, side="right"), schedule)


TIMESTEP_SAMPLING: dict[str, Callable[..., Array]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "importance": importance,
}


def shift_timesteps(
    t: Int[Array, " B"], schedule: NoiseSchedule, shift: float | int
) -> Int[Array, " B"]:
    """Timesteps with the shifted share of the noise of t; see `spacings.shifted`."""
    total = schedule.num_timesteps
    moved = jnp.round(total * shifted((t + 1) / total, shift)) - 1
    return _below(jnp.maximum(moved, 0), schedule)


def _below(t: Array, schedule: NoiseSchedule) -> Array:
    return jnp.minimum(t.astype(jnp.int32), schedule.num_timesteps - 1)


def importance_weights(density: Float[Array, " T"]) -> Float[Array, " T"]:
    """1 / (T p_t): multiplies the losses of timesteps drawn from `density`."""
    return jnp.mean(density) / density


def loss_density(squares: Float[Array, " T"], uniform_share: float = 1e-3) -> Float[Array, " T"]:
    """Probabilities ∝ √E[loss²] (Nichol & Dhariwal 2021, §3.3), a share of them uniform."""
    root = jnp.sqrt(squares)
    return (1 - uniform_share) * root / jnp.sum(root) + uniform_share / root.shape[0]


def update_squares(
    squares: Float[Array, " T"], t: Int[Array, " B"], losses: Float[Array, " B"], decay: float = 0.9
) -> Float[Array, " T"]:
    """Moving average of the squared loss of each timestep, for `loss_density`; start from ones."""
    count = jnp.zeros_like(squares).at[t].add(1.0)
    total = jnp.zeros_like(squares).at[t].add(jnp.square(losses))
    share = decay**count
    return share * squares + (1 - share) * total / jnp.maximum(count, 1.0)


def offset_noise(
    keys: Keys, eps: Float[Array, "B *space c"], strength: float
) -> Float[Array, "B *space c"]:
    """Add a random number per image and channel to the noise, so that brightness diffuses, too."""
    shape = (1,) * (eps.ndim - 2) + eps.shape[-1:]
    return eps + strength * normal_per_example(keys, shape)


def perturb_input(keys: Keys, eps: Float[Array, "B ..."], strength: float) -> Float[Array, "B ..."]:
    """More noise for q_sample, while the target stays eps (Ning et al. 2023, algorithm 3)."""
    return eps + strength * normal_per_example(keys, eps.shape[1:])
