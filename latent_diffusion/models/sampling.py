"""Sampling latents from a denoiser: in one program, or in parts between which the host looks on.

`sample` is `begin`, then the evaluations of the network, then `finish`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.rng import SamplingKeys, normal_per_example
from latent_diffusion.core.types import Array, Conditioning, Float, Keys, Number, lookup
from latent_diffusion.models.denoiser import Denoiser, Embedded, Prepared
from latent_diffusion.process import diffusion, guidance
from latent_diffusion.process.constraints import constrained
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.plan import own_options
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.samplers.table import Table, run
from latent_diffusion.process.schedules import Timesteps
from latent_diffusion.process.tiling import tiled


class Sampling(flax.struct.PyTreeNode):
    """All that the evaluations of a call read; see `begin`.

    table: the sampler's coefficients. embedded: see `Denoiser.prepare`. prepared: of the null, the
    first and the other conditionings. weights: of the further prompts. picture, mask: `z_0` and
    `mask` of `begin`. If no step is left, the table is empty, and nothing is prepared.
    """

    timesteps: Timesteps
    options: SamplingOptions
    table: Table
    embedded: Embedded | None = None
    prepared: tuple[Prepared, ...] = ()
    weights: tuple[Number, ...] = ()
    picture: Float[Array, "B h w c"] | None = None
    mask: Float[Array, "B h w 1"] | None = None


def sample(
    denoiser: Denoiser,
    keys: SamplingKeys,
    conditioning: Conditioning,
    null: Conditioning,
    timesteps: Timesteps,
    shape: tuple[int, int, int],
    options: SamplingOptions,
    *,
    nearest: Callable[[Array], Array] | None = None,
    guide: Callable[[Any], Any] | None = None,
    tile: tuple[int, int] | None = None,
    **start: Any,
) -> Float[Array, "B h w c"]:
    """Scaled latents by a whole sampling loop; traceable, so that it compiles as one program.

    conditioning ... options, start: arguments of `begin`. nearest, guide, tile: see `denoise_of`.
    """
    given = (keys, conditioning, null, timesteps, shape, options)
    sampling, z = begin(denoiser, *given, tile=tile, **start)
    if len(sampling.table.t):
        denoise = denoise_of(denoiser, sampling, keys, nearest=nearest, guide=guide, tile=tile)
        z = run(sampling.table, denoise, z, noise_keys(sampling, keys))
    return finish(sampling, z)


def begin(
    denoiser: Denoiser,
    keys: SamplingKeys,
    conditioning: Conditioning,
    null: Conditioning,
    timesteps: Timesteps,
    shape: tuple[int, int, int],
    options: SamplingOptions,
    *,
    negative: Conditioning | None = None,
    more: Sequence[tuple[Conditioning, Number]] = (),
    z_T: Float[Array, "B h w c"] | None = None,
    z_0: Float[Array, "B h w c"] | None = None,
    mask: Float[Array, "B h w 1"] | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Sampling, Float[Array, "B h w c"]]:
    """All that is computed before the first evaluation, and the latent there.

    keys: from `sampling_keys`; an image's noise depends only on its keys. null: the unconditional
    conditioning. timesteps, options: from `process.plan.plan`. shape: (h, w, c). negative: replaces
    null, or is avoided with the weight `options.perpendicular`. more: further conditionings and
    their weights, beside the first of weight 1. z_T: start noise instead of fresh noise. z_0: a
    picture's latents; with `options.strength` its coarse part stays, with mask (1 = hole) the part
    outside holes. tile: see `denoise_of`.
    """
    if (count := options.guidance_channels or 0) > shape[-1]:
        raise ValueError(f"guidance_channels={count}: the latent has {shape[-1]} channels")
    if negative is None:  # a model's default, for calls with negative_prompts
        options = dataclasses.replace(options, perpendicular=None)
    if getattr(denoiser.network, "guidance_dim", None) is not None:
        conditioning, options = _with_guidance_input(conditioning, options, negative, more)
    if options.guidance_scale is not None and not jax.tree.leaves(null):
        raise ValueError("guidance_scale needs a condition: this model has none, so it is 1")
    if options.perpendicular is None and negative is not None:
        null, negative = negative, None
    z = normal_per_example(keys.start, shape) if z_T is None else z_T
    picture: Any = z_0
    if picture is None and (options.strength is not None or mask is not None):
        raise ValueError("strength and mask need the picture that they change")
    late = options.start is not None
    if late and z_T is None and picture is None:
        raise ValueError("start needs z_T, the latents there, or image")
    schedule = denoiser.schedule
    if options.strength is not None or (late and z_T is None):
        z = q_sample(schedule, picture, timesteps[0], z)
        if len(timesteps) == 1:
            return Sampling(timesteps, options, Table(timesteps[:0])), z
    elif not late:  # if late, z_T already has the noise of the first timestep
        spread = {"unit": lambda t: 1.0, "sigma": schedule.sigma_t}
        z = lookup(spread, options.spread or "unit", "spread")(timesteps[0]) * z
    table = SAMPLERS[options.sampler].table(schedule, timesteps, **own_options(options))
    others = [c for c, _ in more] + ([] if negative is None else [negative])
    chosen = _with_variance(denoiser, options)
    t = _rounding(options)(table.t)
    height, width = (n if tile is None else min(n, tile[0]) for n in shape[:2])
    seen = (height, width, shape[2])
    embedded, prepared = chosen.prepare(t, seen, null, conditioning, *others)
    weights = tuple(weight for _, weight in more)
    return Sampling(timesteps, options, table, embedded, prepared, weights, picture, mask), z


def denoise_of(
    denoiser: Denoiser,
    sampling: Sampling,
    keys: SamplingKeys,
    *,
    nearest: Callable[[Array], Array] | None = None,
    guide: Callable[[Any], Any] | None = None,
    tile: tuple[int, int] | None = None,
) -> diffusion.Denoiser:
    """The function that the sampler evaluates, `denoise(z_t, t) -> Prediction`.

    nearest: replaces estimates of z_0 by their closest codes. guide: wraps the denoiser, see
    `steering`. tile: (side, overlap) of the tiles of the latent on which the network runs; None: it
    runs on the whole.
    """
    options, schedule = sampling.options, denoiser.schedule
    assert sampling.embedded is not None  # there is a step
    network = _with_variance(denoiser, options).prepared_network(sampling.embedded)
    network = guidance.at_timesteps(network, _rounding(options))
    count = 2 + len(sampling.weights)
    denoise = guidance.guided(
        network if tile is None else in_tiles(network, *tile),
        schedule,
        denoiser.prediction,
        sampling.prepared[:count],
        options,
        sampling.timesteps,
        sampling.weights,
        sampling.prepared[count] if len(sampling.prepared) > count else None,
    )
    if guide is not None:
        denoise = guide(denoise)
    by_eps = SAMPLERS[options.sampler].by_eps
    denoise = constrained(denoise, schedule, options, nearest, by_eps)
    if sampling.mask is None or sampling.picture is None:
        return denoise
    return guidance.inpaint(denoise, schedule, sampling.picture, sampling.mask, keys.hole)


def noise_keys(sampling: Sampling, keys: SamplingKeys) -> Keys:
    """The keys of the sampler's noise."""
    if sampling.options.start is None:
        return keys.steps
    # Draw other noise than the call that stopped here.
    first = sampling.timesteps[0].astype(int)
    return jax.vmap(jax.random.fold_in, (0, None))(keys.steps, first)


def finish(sampling: Sampling, z: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """The result of a call whose evaluations have led to the latent z."""
    noisy = sampling.options.end is not None
    if sampling.mask is None or sampling.picture is None or noisy:
        return z
    return guidance.paste(z, sampling.picture, sampling.mask)


def _rounding(options: SamplingOptions) -> Callable[[Array], Array]:
    """From the sampler's timesteps to those that the network gets."""
    return lookup(guidance.ROUNDINGS, options.network_timesteps or "exact", "network_timesteps")


def _with_variance(denoiser: Denoiser, options: SamplingOptions) -> Denoiser:
    return denoiser.with_variance("learned_variance") if options.learned_variance else denoiser


def _with_guidance_input(
    conditioning: Conditioning, options: SamplingOptions, negative: Any, more: Sequence[Any]
) -> tuple[Conditioning, SamplingOptions]:
    """The conditioning with the guidance scale as an input of the network, and options without it.

    Raises ValueError for options that need a second evaluation of the network.
    """
    names = ("guidance_interval", "guidance_rescale", "perpendicular")
    chosen = [name for name in names if getattr(options, name) is not None]
    chosen += ["cfg_pp"] if options.cfg_pp else []
    chosen += ["negative_prompts"] if negative is not None else []
    chosen += ["more_prompts"] if more else []
    scale = jnp.asarray(1.0 if options.guidance_scale is None else options.guidance_scale)
    chosen += ["a guidance_scale for each step"] if scale.ndim else []
    if chosen:
        raise ValueError(f"this network has its guidance in it, which rules out {chosen[0]}")
    leaves = jax.tree.leaves(conditioning)
    count = leaves[0].shape[0] if leaves else 1
    conditioning = dataclasses.replace(conditioning, guidance=jnp.broadcast_to(scale - 1, (count,)))
    return conditioning, dataclasses.replace(options, guidance_scale=None)


def in_tiles(network: guidance.Network, side: int, overlap: int) -> guidance.Network:
    """`network` on overlapping tiles of the latent, its concatenated condition and hints, blended.

    It is for pictures whose activations don't fit into memory. Norms and self-attention see a tile
    instead of the whole.
    """

    def over_tiles(z_t: Array, now: Array, prepared: Prepared) -> Array:
        conditioning = prepared.conditioning
        if conditioning.features:
            raise ValueError("tile_size doesn't go with a T2I-Adapter, whose features are a whole")
        concat = () if conditioning.concat is None else (conditioning.concat,)
        maps = [z_t, *concat, *(control.hint for control in conditioning.controls)]
        ends = np.cumsum([x.shape[-1] for x in maps])[:-1]

        def on_tile(x: Array) -> Array:
            z_tile, *others = jnp.split(x, ends, -1)
            fields: dict[str, Any] = {"concat": others.pop(0)} if concat else {}
            hints = zip(conditioning.controls, others, strict=True)
            controls = tuple(dataclasses.replace(c, hint=hint) for c, hint in hints)
            part = dataclasses.replace(conditioning, **fields, controls=controls)
            return network(z_tile, now, prepared.replace(conditioning=part))

        return tiled(on_tile, jnp.concatenate(maps, -1), side, overlap)

    return over_tiles
