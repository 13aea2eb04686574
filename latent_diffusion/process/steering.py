"""Guidance by gradients (Rombach et al. 2022, App. C): toward a class, or toward a picture.

Both wrap a denoiser, like everything in `guidance`. If p(y | z_t) is the likelihood of the class
or picture y, the score of the posterior gives

    eps ← eps − s·sigma_t·∇_{z_t} log p(y | z_t),    z_0 ← z_0 + s·(sigma_t² / alpha_t)·∇ log p.

The scale s = 1 is Bayes' rule, and larger ones sharpen the likelihood. (The paper's equation has a
plus sign before the gradient of its eps; the score is −eps / sigma_t.) Where z_t is nearly pure
noise, sigma_t² / alpha_t is in the thousands. The true gradient is accordingly small there, but a
network's isn't: so no step moves z_0 further than LIMIT. Where z_t is pure noise (alpha_t is 0),
the product has a limit, and both factors are taken at the last timestep with some signal.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Number
from latent_diffusion.process.diffusion import Denoiser, Prediction
from latent_diffusion.process.schedules import NoiseSchedule

LIMIT = 4.0  # largest root mean square by which a guide moves z_0, whose scale is about 1


def by_classifier(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    log_prob: Callable[[Array, Array], Array],
    scale: Number = 1.0,
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, algorithm 2), for any sampler.

    log_prob(z_t, t) -> log p(y | z_t) [B], of a classifier of noisy latents.
    """

    def guided(z_t: Array, t: Array) -> Prediction:
        with_signal = _with_signal(schedule, t)
        gradient = jax.grad(lambda z: jnp.sum(log_prob(z, with_signal)))(z_t)
        return _moved(denoise(z_t, t), schedule, z_t, t, scale * gradient)

    return guided


def by_likelihood(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    log_likelihood: Callable[[Array, Array], Array],
    scale: Number = 1.0,
) -> Denoiser:
    """Image guiding. log_likelihood(z_0, t) -> log p(y | z_0) [B], at the estimate of z_0.

    The gradient passes through the network: z_0 is a function of z_t. For a target y and a
    transformation T of decoded pixels, the paper has −½‖y − T(D(z_0))‖²; see `toward`.
    """

    def guided(z_t: Array, t: Array) -> Prediction:
        with_signal = _with_signal(schedule, t)

        def estimate(z: Array) -> tuple[Array, Prediction]:
            pred = denoise(z, with_signal)
            return jnp.sum(log_likelihood(pred.z_0, with_signal)), pred

        gradient, pred = jax.grad(estimate, has_aux=True)(z_t)
        return _moved(pred, schedule, z_t, t, scale * gradient)

    return guided


def toward(
    target: Array,
    decode: Callable[[Array], Array],
    distance: Callable[[Array, Array], Array] | None = None,
) -> Callable[[Array, Array], Array]:
    """The log-likelihood of a target picture [B h w C], of the decoded picture's size or smaller.

    distance: (pictures, target) -> [B]; None = half the squared error, summed over pixels. For a
    smaller target, the picture is resized to it (bicubic).
    """

    def log_likelihood(z_0: Array, t: Array) -> Array:
        images = decode(z_0)
        resized = jax.image.resize(images, (*images.shape[:1], *target.shape[1:]), "cubic")
        if distance is not None:
            return -distance(resized, target)
        return -0.5 * jnp.sum(jnp.square(resized - target), axis=(1, 2, 3))

    return log_likelihood


def _with_signal(schedule: NoiseSchedule, t: Array) -> Array:
    """t, or the last timestep with any signal, if that is smaller."""
    return jnp.minimum(t, jnp.sum(schedule.alphas > 0) - 1)


def _moved(
    pred: Prediction, schedule: NoiseSchedule, z_t: Array, t: Array, gradient: Array
) -> Prediction:
    with_signal = _with_signal(schedule, t)
    alpha_t, sigma_t = schedule.alpha_t(with_signal), schedule.sigma_t(with_signal)
    size = jnp.sqrt(jnp.mean(jnp.square(gradient), axis=(1, 2, 3), keepdims=True))
    largest = LIMIT * alpha_t / sigma_t**2
    gradient = gradient * jnp.minimum(1.0, largest / jnp.maximum(size, 1e-20))
    return pred._replace(
        z_0=pred.z_0 + sigma_t**2 / alpha_t * gradient,
        eps=jnp.where(with_signal == t, pred.eps - sigma_t * gradient, z_t / schedule.sigma_t(t)),
    )
