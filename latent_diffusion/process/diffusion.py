"""The diffusion process: noising, and the quantities that a network may predict.

z_t = alpha_t z_0 + sigma_t eps (Ho et al. 2020; Kingma et al. 2021). Every prediction type is a
combination a z_0 + b eps, so one 2×2 system converts all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, lookup
from latent_diffusion.process.schedules import NoiseSchedule, Timestep


class Prediction(NamedTuple):
    """A denoiser's estimates of the clean latent and of the noise in z_t.

    variance: a learned variance of the step from t to s. Its logarithm is interpolated from that of
    q(z_s | z_t, z_0), the smallest variance, at −1, to that of q(z_t | z_s), the largest, at 1.
    """

    z_0: Float[Array, "B ..."]
    eps: Float[Array, "B ..."]
    variance: Float[Array, "B ..."] | None = None


Denoiser = Callable[[Array, Array], Prediction]  # (z_t [B ...], t scalar) -> Prediction

# (alpha_t, sigma_t) -> (a, b) by prediction type: the network predicts a z_0 + b eps.
PREDICTIONS: dict[str, Callable[[Array, Array], tuple[Array | float, Array | float]]] = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho 2022
    # The network within Karras' preconditioning (table 1 of Karras et al. 2022), as a function of
    # alpha = 1/√(s² + d²) and sigma = s/√(s² + d²), where d is the standard deviation of z_0.
    "edm": lambda alpha, sigma: (
        alpha * sigma / jnp.sqrt(1 - sigma**2),
        -jnp.sqrt(1 - sigma**2),
    ),
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # velocity of a rectified flow (Liu et al. 2022)
}


def expand(coefficient: Array, like: Array) -> Array:
    """Append axes to coefficients [B] or [], so that they multiply a latent [B ...]."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def q_sample(
    schedule: NoiseSchedule, z_0: Float[Array, "B ..."], t: Timestep, eps: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Noise z_0 to timestep t ([B] or a scalar): alpha_t z_0 + sigma_t eps."""
    return expand(schedule.alpha_t(t), z_0) * z_0 + expand(schedule.sigma_t(t), z_0) * eps


def prediction_target(
    kind: str,
    schedule: NoiseSchedule,
    z_0: Float[Array, "B ..."],
    eps: Float[Array, "B ..."],
    t: Timestep,
) -> Float[Array, "B ..."]:
    """The target at z_t of a network that predicts `kind` ("eps", "x0", "v" or "flow")."""
    alpha_t, sigma_t = expand(schedule.alpha_t(t), z_0), expand(schedule.sigma_t(t), z_0)
    a, b = lookup(PREDICTIONS, kind, "prediction type")(alpha_t, sigma_t)
    return a * z_0 + b * eps


def to_z_0_and_eps(
    kind: str,
    pred: Float[Array, "B ..."],
    alpha_t: Float[Array, "..."],
    sigma_t: Float[Array, "..."],
    z_t: Float[Array, "B ..."],
) -> Prediction:
    """Convert a network's prediction `pred` at z_t; alpha_t and sigma_t are scalars or [B].

    Where pred has twice the channels of z_t, its second half is the learned variance.
    """
    channels = z_t.shape[-1]
    pred, variance = pred[..., :channels], pred[..., channels:]
    alpha_t, sigma_t = expand(alpha_t, z_t), expand(sigma_t, z_t)
    a, b = lookup(PREDICTIONS, kind, "prediction type")(alpha_t, sigma_t)
    determinant = alpha_t * b - sigma_t * a
    z_0 = (b * z_t - sigma_t * pred) / determinant
    eps = (alpha_t * pred - a * z_t) / determinant
    return Prediction(z_0, eps, variance if variance.shape[-1] else None)


def variance_factor(variance: Array, log_range: Array) -> Array:
    """A learned variance / the smallest variance. log_range: log(largest / smallest variance)."""
    return jnp.exp((variance + 1) / 2 * log_range)


def prior_bits_per_dim(schedule: NoiseSchedule, z_0: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """KL(q(z_{T−1} | z_0) ‖ N(0, 1)) of each example, in bits per dimension."""
    alpha, sigma = schedule.alphas[-1], schedule.sigmas[-1]
    nats = 0.5 * (sigma**2 + jnp.square(alpha * z_0) - 1) - jnp.log(sigma)
    return jnp.mean(nats.reshape(z_0.shape[0], -1), axis=1) / jnp.log(2.0)
