"""Constraints on the estimate of z_0, as wrappers of a denoiser."""

from collections.abc import Callable

import jax.numpy as jnp

from latent_diffusion.core.types import Array, Number
from latent_diffusion.process.diffusion import Denoiser, Prediction
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.schedules import NoiseSchedule


def constrained(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    options: SamplingOptions,
    nearest: Callable[[Array], Array] | None,
    recompute_eps: bool,
) -> Denoiser:
    """The denoiser with the constraints on z_0 that the planned options choose.

    nearest: see `quantize`. recompute_eps: see `_change_z_0`.
    """
    kwargs = {"recompute_eps": recompute_eps}
    if (bound := options.clip_x0) is not None:
        denoise = clip(denoise, schedule, -bound, bound, **kwargs)
    if (ratio := options.dynamic_threshold) is not None:
        limit = jnp.inf if options.threshold_limit is None else options.threshold_limit
        denoise = dynamic_threshold(denoise, schedule, ratio, limit, **kwargs)
    if nearest is not None:
        denoise = quantize(denoise, schedule, nearest, **kwargs)
    return denoise


def clip(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    low: Number = -1.0,
    high: Number = 1.0,
    recompute_eps: bool = True,
) -> Denoiser:
    """Clip the estimate of z_0 (pixel-space models). See `_change_z_0` for recompute_eps."""
    return _change_z_0(denoise, lambda z_0: jnp.clip(z_0, low, high), schedule, recompute_eps)


def dynamic_threshold(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    ratio: Number = 0.995,
    limit: Number = jnp.inf,
    recompute_eps: bool = True,
) -> Denoiser:
    """Clip |z_0| at each example's `ratio` quantile, then scale to [−1, 1] (Imagen, §2.3).

    The threshold is at least 1 and at most `limit`. ratio: in (0, 1].
    """

    def threshold(z_0: Array) -> Array:
        bound = jnp.quantile(jnp.abs(z_0), ratio, axis=tuple(range(1, z_0.ndim)), keepdims=True)
        bound = jnp.clip(bound, 1.0, limit)
        return jnp.clip(z_0, -bound, bound) / bound

    return _change_z_0(denoise, threshold, schedule, recompute_eps)


def norm_threshold(
    denoise: Denoiser, schedule: NoiseSchedule, limit: float, recompute_eps: bool = True
) -> Denoiser:
    """Scale z_0 down if an example's root mean square exceeds `limit` (for latents)."""

    def threshold(z_0: Array) -> Array:
        rms = jnp.sqrt(jnp.mean(z_0**2, axis=tuple(range(1, z_0.ndim)), keepdims=True))
        return z_0 * (limit / jnp.maximum(rms, limit))

    return _change_z_0(denoise, threshold, schedule, recompute_eps)


def quantize(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    nearest: Callable[[Array], Array],
    recompute_eps: bool = False,
) -> Denoiser:
    """Replace z_0 by `nearest(z_0)`, the closest entries of a VQ model's codebook.

    The original LDM doesn't change eps, hence the default.
    """
    return _change_z_0(denoise, nearest, schedule, recompute_eps)


def _change_z_0(
    denoise: Denoiser,
    change: Callable[[Array], Array],
    schedule: NoiseSchedule,
    recompute_eps: bool,
) -> Denoiser:
    """recompute_eps: whether eps changes, too, so that alpha_t z_0 + sigma_t eps stays z_t."""

    def changed(z_t: Array, t: Array) -> Prediction:
        pred = denoise(z_t, t)
        z_0 = change(pred.z_0)
        if not recompute_eps:
            return pred._replace(z_0=z_0)
        eps = (z_t - schedule.alpha_t(t) * z_0) / schedule.sigma_t(t)
        return pred._replace(z_0=z_0, eps=eps)

    return changed
