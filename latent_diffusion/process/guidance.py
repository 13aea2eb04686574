"""Wrappers between a network and a sampler: conditioning, guidance, holes.

A *network* is `network(z_t [B h w c], t [B], conditioning) -> raw prediction`. A *denoiser*, which
samplers take, is `denoise(z_t, t scalar) -> Prediction(z_0, eps)`. Guidance makes a denoiser of a
network and combines raw predictions, as is usual; everything else wraps a denoiser.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import normal_per_example
from latent_diffusion.core.types import Array, Float, Keys, Number
from latent_diffusion.process.diffusion import Denoiser, Prediction, q_sample, to_z_0_and_eps
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps

Network = Callable[[Array, Array, Any], Array]
Scale = float | int | Array | Callable[[Array], Array]

# ------------------------------------------------------------------------------ from the network


def guided(
    network: Network,
    schedule: NoiseSchedule,
    kind: str,
    conditionings: Sequence[Any],
    options: SamplingOptions,
    timesteps: Timesteps,
    weights: Sequence[Number] = (),
    negative: Any = None,
) -> Denoiser:
    """The denoiser with the kind of guidance that the planned options choose.

    conditionings: the null, the first, and one for each of the weights. negative: the conditioning
    that `perpendicular` avoids. Raises ValueError for options that exclude each other.
    """
    options = jax.tree.map(jnp.asarray, options)
    null, first, *others = conditionings
    scale: Any = options.guidance_scale
    if scale is not None and scale.ndim:
        scale = per_step(scale, timesteps)
    scale_or_one = 1.0 if scale is None else scale  # only `classifier_free` takes None
    interval, rescale = options.guidance_interval, options.guidance_rescale
    kinds = {
        "more_prompts": bool(others),
        "perpendicular": options.perpendicular is not None,
        "cfg_pp": options.cfg_pp,
    }
    chosen = [name for name, value in kinds.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} don't go together")
    if chosen and (interval is not None or rescale is not None):
        raise ValueError(f"{chosen[0]} knows no guidance_interval or guidance_rescale")
    model = (network, schedule, kind)
    more: dict[str, Any] = {"channels": options.guidance_channels}
    if others:
        return composed(*model, [first, *others], [1.0, *weights], null, scale_or_one, **more)
    if options.perpendicular is not None:
        return perpendicular(
            *model, first, negative, null, scale_or_one, options.perpendicular, **more
        )
    if options.cfg_pp:
        return classifier_free_pp(*model, first, null, scale_or_one, **more)
    more |= {"interval": interval, "rescale": rescale}
    return classifier_free(*model, first, null, scale, **more)


# From the sampler's timesteps to those that the network gets.
ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "exact": lambda t: t,
    "round": jnp.round,
    "floor": lambda t: jnp.floor(t + 1e-3),  # rounding errors may make integers smaller
}


def at_timesteps(network: Network, rounded: Callable[[Array], Array]) -> Network:
    """The network, called with `rounded` timesteps; noise levels stay those of the sampler."""
    return lambda z_t, t, conditioning: network(z_t, rounded(t), conditioning)


def from_prediction(network: Network, schedule: NoiseSchedule, kind: str) -> Callable:
    """Turn a network into `denoise(z_t, t, conditioning=None) -> Prediction`.

    kind: the quantity that the network predicts, a name in `diffusion.PREDICTIONS`.
    """

    def denoise(z_t: Array, t: Array, conditioning: Any = None) -> Prediction:
        pred = network(z_t, _batched(t, z_t), conditioning)
        return to_z_0_and_eps(kind, pred, schedule.alpha_t(t), schedule.sigma_t(t), z_t)

    return denoise


def classifier_free(
    network: Network,
    schedule: NoiseSchedule,
    kind: str,
    conditioning: Any,
    null_conditioning: Any,
    scale: Scale | None,
    *,
    interval: Sequence[Any] | Array | None = None,
    rescale: Number | None = None,
    channels: int | None = None,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale · (conditional − null).

    conditioning, null_conditioning: pytrees of arrays [B ...] (the null's may be [1 ...]); a
    negative prompt is just another null. Both are evaluated in one batch, null first.
    scale: a number, an array [] or [B], or a function of the timestep (see `per_step`). None
    evaluates the network only on the conditioning, which gives the same result as 1.
    interval: (low, high) timesteps; outside, only the conditional prediction is computed
    (Kynkäänniemi et al. 2024). rescale: in [0, 1], how far to pull each example's standard
    deviation back to the conditional prediction's (Lin et al. 2023, §3.4).
    channels: the number of channels that are guided, from the first; the others are those of the
    conditional prediction. None: all channels of the latent; a learned variance is never guided.
    """
    plain = from_prediction(network, schedule, kind)

    def conditional(z_t: Array, t: Array) -> Prediction:
        return plain(z_t, t, conditioning)

    if scale is None:
        return conditional
    if null_conditioning is None:
        raise ValueError(f"guidance scale {scale} needs a null conditioning; without one it is 1")
    evaluate = _several(network, [null_conditioning, conditioning], channels)

    def guided(z_t: Array, t: Array) -> Prediction:
        null, cond = evaluate(z_t, t)
        pred = null + _scale_at(scale, t, null) * (cond - null)
        if rescale is not None:
            # Further channels aren't guided, or are a learned variance.
            size = z_t.shape[-1] if channels is None else channels
            spread = _std(cond[..., :size]) / _std(pred[..., :size])
            pred = pred.at[..., :size].multiply(1 + rescale * (spread - 1))
        return to_z_0_and_eps(kind, pred, schedule.alpha_t(t), schedule.sigma_t(t), z_t)

    if interval is None:
        return guided
    low, high = interval
    return lambda z_t, t: jax.lax.cond((low <= t) & (t <= high), guided, conditional, z_t, t)


def classifier_free_pp(
    network: Network,
    schedule: NoiseSchedule,
    kind: str,
    conditioning: Any,
    null_conditioning: Any,
    scale: Scale,
    channels: int | None = None,
) -> Denoiser:
    """CFG++ (Chung et al. 2024): guided z_0, but the null's eps; scale in [0, 1].

    It is for samplers whose step is a combination of both (ddim, euler, euler_ancestral).
    """
    evaluate = _several(network, [null_conditioning, conditioning], channels)

    def denoise(z_t: Array, t: Array) -> Prediction:
        alpha_t, sigma_t = schedule.alpha_t(t), schedule.sigma_t(t)
        null, cond = evaluate(z_t, t)
        pred = null + _scale_at(scale, t, null) * (cond - null)
        guided = to_z_0_and_eps(kind, pred, alpha_t, sigma_t, z_t)
        return guided._replace(eps=to_z_0_and_eps(kind, null, alpha_t, sigma_t, z_t).eps)

    return denoise


def composed(
    network: Network,
    schedule: NoiseSchedule,
    kind: str,
    conditionings: Sequence[Any],
    weights: Sequence[Number],
    null_conditioning: Any,
    scale: Scale,
    channels: int | None = None,
) -> Denoiser:
    """Several weighted prompts: null + scale · Σ w_i (pred_i − null) (Liu et al. 2022, eq. 11).

    A negative weight steers away from its prompt.
    """
    if len(conditionings) != len(weights):
        raise ValueError(f"{len(conditionings)} conditionings but {len(weights)} weights")
    evaluate = _several(network, [null_conditioning, *conditionings], channels)

    def denoise(z_t: Array, t: Array) -> Prediction:
        null, *preds = evaluate(z_t, t)
        direction = sum(w * (pred - null) for w, pred in zip(weights, preds, strict=True))
        pred = null + _scale_at(scale, t, null) * direction
        return to_z_0_and_eps(kind, pred, schedule.alpha_t(t), schedule.sigma_t(t), z_t)

    return denoise


def perpendicular(
    network: Network,
    schedule: NoiseSchedule,
    kind: str,
    conditioning: Any,
    negative: Any,
    null_conditioning: Any,
    scale: Scale,
    negative_scale: Number = 1.0,
    channels: int | None = None,
) -> Denoiser:
    """Perp-Neg (Armandpour et al. 2023): avoid only the part perpendicular to the prompt.

    negative: the conditioning to avoid; its component along the prompt's direction is ignored.
    """
    evaluate = _several(network, [null_conditioning, conditioning, negative], channels)

    def denoise(z_t: Array, t: Array) -> Prediction:
        null, cond, avoid = evaluate(z_t, t)
        toward, away = cond - null, avoid - null
        along = _sum(away * toward) / jnp.maximum(_sum(toward * toward), 1e-20)
        direction = toward - negative_scale * (away - along * toward)
        pred = null + _scale_at(scale, t, null) * direction
        return to_z_0_and_eps(kind, pred, schedule.alpha_t(t), schedule.sigma_t(t), z_t)

    return denoise


def per_step(values: Float[Array, " S"], timesteps: Timesteps) -> Callable[[Array], Array]:
    """A guidance scale for each step: values[i] holds from timesteps[i] down to the next."""
    if len(values) != len(timesteps) - 1:
        raise ValueError(f"{len(values)} guidance scales for {len(timesteps) - 1} steps")
    return lambda t: values[jnp.minimum(jnp.sum(timesteps[1:] >= t), len(values) - 1)]


def _several(
    network: Network, conditionings: Sequence[Any], channels: int | None
) -> Callable[..., list[Array]]:
    """Evaluate the network under several conditionings in one batch: the null, the first, ...

    Only the first `channels` (None: those of the latent) differ between predictions. The other
    channels are the first conditioning's in all of them, so combinations don't guide these.
    """
    shapes = {jax.tree.structure(c) for c in conditionings}
    if len(shapes) > 1:
        raise ValueError("conditioning and null conditioning must have the same fields")
    size = max((x.shape[0] for x in jax.tree.leaves(list(conditionings))), default=1)

    def stack(*leaves: Array) -> Array:
        if len({x.shape[1:] for x in leaves}) > 1:
            raise ValueError(
                "conditioning and null conditioning must have the same shape but for the batch, "
                f"got {' and '.join(str(x.shape) for x in leaves)}"
            )
        return jnp.concatenate([jnp.broadcast_to(x, (size, *x.shape[1:])) for x in leaves])

    stacked = jax.tree.map(stack, *conditionings)
    count = len(conditionings)

    def evaluate(z_t: Array, t: Array) -> list[Array]:
        guided = z_t.shape[-1] if channels is None else channels
        z_t = jnp.concatenate([z_t] * count)
        preds = jnp.split(network(z_t, _batched(t, z_t), stacked), count)
        if guided >= preds[0].shape[-1]:
            return preds
        rest = preds[1][..., guided:]
        return [jnp.concatenate([pred[..., :guided], rest], -1) for pred in preds]

    return evaluate


def _batched(t: Array, z_t: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.float32), z_t.shape[:1])


def _scale_at(scale: Scale, t: Array, like: Array) -> Array:
    value = jnp.asarray(scale(t) if callable(scale) else scale)
    return value.reshape(value.shape + (1,) * (like.ndim - 1) * value.ndim)


def _std(x: Array) -> Array:
    return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True, ddof=1)


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)), keepdims=True)


# ------------------------------------------------------------------------------ starting from z_0


def inpaint(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    known: Float[Array, "B h w c"],
    mask: Float[Array, "B h w 1"],
    rng: Keys,
) -> Denoiser:
    """Fill the hole (mask 1): before each evaluation, the rest becomes `known`, noised to level t.

    known: latents. rng: one key per image, different from the sampler's. Finish with `paste`, since
    the sampler also changes the part outside the hole.
    """

    def filled(z_t: Array, t: Array) -> Prediction:
        # The noise depends on the timestep, whatever the sampler: fold in the bits of t.
        bits = jax.lax.bitcast_convert_type(jnp.asarray(t, jnp.float32), jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (0, None))(rng, bits)
        noised = q_sample(schedule, known, t, normal_per_example(keys, known.shape[1:]))
        return denoise(paste(z_t, noised, mask), t)

    return filled


def paste(
    z: Float[Array, "B h w c"], known: Float[Array, "B h w c"], mask: Float[Array, "B h w 1"]
) -> Float[Array, "B h w c"]:
    """z in the hole (mask 1), `known` elsewhere."""
    return mask * z + (1 - mask) * known
