"""The conditional denoiser: U-Net, conditioner and noise schedule as one pytree that samples."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.nets.conditioners import Conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process import guidance
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import (
    SPACINGS,
    NoiseSchedule,
    Timesteps,
    make_schedule,
    spacing,
)
from latent_diffusion.process.tiling import tiled
from latent_diffusion.rng import normal_per_example, split_per_example
from latent_diffusion.types import (
    Array,
    Batch,
    Bool,
    Conditioning,
    Config,
    Float,
    Keys,
    Num,
    Params,
    lookup,
)

# What a sampling call can be told, beside the options of its sampler and of its spacing.
OPTIONS = (
    "sampler",
    "num_steps",
    "spacing",
    "end",
    "guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "cfg_pp",
    "perpendicular",
    "clip_x0",
    "dynamic_threshold",
    "strength",
    "progress",
    "preview",
)
# CFG++ tells z_0 from eps, so it is for samplers that take one step with both.
CFG_PP_SAMPLERS = ("ddim", "euler", "euler_ancestral")
FALLBACK = {"sampler": "ddim", "num_steps": 50, "spacing": "trailing"}


def plan(
    schedule: NoiseSchedule, defaults: Config, given: Mapping[str, Any]
) -> tuple[Timesteps, dict[str, Any]]:
    """The timesteps, and the options of `Denoiser.sample`, for `given` over a model's `defaults`.

    None stands for nothing. Defaults of a sampler or spacing that `given` replaces by another one
    don't count. Raises ValueError for an option that neither sampling, nor the sampler, nor the
    spacing has.
    """
    defaults = {**FALLBACK, **{k: v for k, v in defaults.items() if v is not None}}
    given = {k: v for k, v in given.items() if v is not None}
    for part, options_of in (("sampler", _of_sampler), ("spacing", _of_spacing)):
        if given.get(part, defaults[part]) != defaults[part]:
            replaced = options_of(defaults[part])
            defaults = {k: v for k, v in defaults.items() if k not in replaced}
    options = {**defaults, **given}
    sampler, name = options["sampler"], options.pop("spacing")
    known = [*OPTIONS, *_of_sampler(sampler), *_of_spacing(name)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"unknown option {option!r} for sampler {sampler!r} with spacing {name!r}; "
                f"known: {', '.join(sorted(set(known)))}"
            )
    num_steps = options.pop("num_steps")
    if not isinstance(num_steps, int) or isinstance(num_steps, bool):
        raise ValueError(f"num_steps={num_steps!r} must be an integer")
    own = {k: options.pop(k) for k in _of_spacing(name) if k in options}
    return spacing(name, schedule, num_steps, **own), options


def _of_sampler(name: str) -> list[str]:
    """The names of a sampler's own options, after (schedule, timesteps)."""
    return list(inspect.signature(lookup(SAMPLERS, name, "sampler").table).parameters)[2:]


def _of_spacing(name: str) -> list[str]:
    """Those of a spacing, after (log_snr, num, end), and where it ends."""
    return ["end", *list(inspect.signature(lookup(SPACINGS, name, "spacing")).parameters)[3:]]


class Prepared(flax.struct.PyTreeNode):
    """A conditioning, and what the U-Net computes from it alone, at every step: [B ...] leaves.

    of_context: keys and values of the cross-attention. of_timestep: projections of the timestep
    embedding, [B N F] over the timesteps; None where they are the same for all examples.
    """

    conditioning: Conditioning
    of_context: Any
    of_timestep: Any


class Denoiser(flax.struct.PyTreeNode):
    """Modules, schedule and parameters {"unet", "conditioner"} of a trained (or training) model.

    prediction: what the U-Net predicts: "eps", "x0", "v" or "flow".
    """

    params: Params
    schedule: NoiseSchedule
    unet: UNet = flax.struct.field(pytree_node=False)
    conditioner: Conditioner = flax.struct.field(pytree_node=False)
    prediction: str = flax.struct.field(pytree_node=False)

    def condition(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        """The conditioning of a batch; unconditional where `drop` is true."""
        params = self.params.get("conditioner", {})
        out: Any = self.conditioner.apply({"params": params}, batch, drop)
        return out

    def denoise(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Float[Array, "B h w k"]:
        """The raw network output."""
        out: Any = self.unet.apply(
            {"params": self.params["unet"]}, z_t, t, conditioning, train, rngs=rngs
        )
        return out

    def prepare(
        self,
        t: Float[Array, " N"],
        shape: tuple[int, int, int],
        *conditionings: Conditioning,
    ) -> tuple[guidance.Network, tuple[Prepared, ...]]:
        """Compute once what doesn't depend on the latent, for evaluations at the timesteps t.

        Returns a network that takes a `Prepared` for a conditioning, and one for each conditioning:
        it holds the cross-attention's keys and values, and every projection of the timestep's
        embedding. The rest of the U-Net, traced on the way, is dead code to the compiler.
        """
        variables = {"params": self.params["unet"]}

        @functools.partial(jax.jit, static_argnums=0)
        def compute(collection: str, t: Array, conditioning: Conditioning) -> Any:
            leaves = jax.tree.leaves(conditioning)
            z_t = jnp.zeros((leaves[0].shape[0] if leaves else 1, *shape))
            t = jnp.broadcast_to(t, z_t.shape[:1])
            _, seen = self.unet.apply(variables, z_t, t, conditioning, mutable=[collection])
            return seen.get(collection, {})

        def of_timesteps(conditioning: Conditioning) -> Any:
            return jax.vmap(lambda t: compute("of_timestep", t, conditioning), out_axes=1)(t)

        # Where no vector joins the timestep's embedding, its projections serve all examples.
        alike = all(c.vector is None for c in conditionings)
        shared = of_timesteps(jax.tree.map(lambda x: x[:1], conditionings[0])) if alike else None

        def network(z_t: Array, now: Array, prepared: Prepared) -> Array:
            row = jnp.argmin(jnp.abs(t - now[0]))
            of_timestep = shared if alike else prepared.of_timestep
            known = {
                "of_context": prepared.of_context,
                "of_timestep": jax.tree.map(lambda x: x[:, row], of_timestep),
            }
            out: Any = self.unet.apply({**variables, **known}, z_t, now, prepared.conditioning)
            return out

        return network, tuple(
            Prepared(c, compute("of_context", t[0], c), None if alike else of_timesteps(c))
            for c in conditionings
        )

    def sample(
        self,
        keys: Keys,
        conditioning: Conditioning,
        null: Conditioning,
        timesteps: Timesteps,
        shape: tuple[int, int, int],
        *,
        sampler: str = "ddim",
        guidance_scale: float | int | Sequence[float | int] = 1.0,
        guidance_interval: tuple[float | int, float | int] | None = None,
        guidance_rescale: float | int = 0.0,
        cfg_pp: bool = False,
        negative: Conditioning | None = None,
        perpendicular: float | int = 0.0,
        more: Sequence[tuple[Conditioning, float | int]] = (),
        clip_x0: float | int = 0.0,
        dynamic_threshold: float | int = 0.0,
        nearest: Callable[[Array], Array] | None = None,
        z_T: Float[Array, "B h w c"] | None = None,
        z_0: Float[Array, "B h w c"] | None = None,
        mask: Float[Array, "B h w 1"] | None = None,
        strength: float | int = 1.0,
        progress: Callable[[Any], None] | None = None,
        preview: Callable[[Any, Any], None] | None = None,
        guide: Callable[[Any], Any] | None = None,
        tile: tuple[int, int] | None = None,
        **own: Any,
    ) -> Float[Array, "B h w c"]:
        """Scaled latents by a whole sampling loop; traceable, so that it compiles as one program.

        keys: one per image, which alone decides its noise. null: the unconditional conditioning.
        timesteps: [S+1] from `schedules.spacing`. shape: (h, w, c). guidance_scale: a number, or
        one for each step. negative: what to steer away from, instead of null; or beside it, with
        the weight `perpendicular`, where it isn't what the conditioning wants. more: further
        conditionings and weights, beside the first with weight 1. clip_x0: bound of estimates of
        z_0, 0 = off. dynamic_threshold: the ratio, 0 = off. nearest: replaces z_0 by its closest
        codes. z_0: a known image, of which strength < 1 keeps the coarse part and mask (1 = hole)
        the rest; strength 1 starts from noise alone. progress, preview: called on the host. guide:
        wraps the denoiser, see `steering`. tile: (side, overlap) of the parts of the latent that
        the network sees, None for the whole. own: options of the sampler. See `guidance` for all
        of these.
        """
        start, steps, fill = split_per_example(keys, 3)
        z_T = normal_per_example(start, shape) if z_T is None else z_T
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        scale: Any = guidance_scale
        several = isinstance(scale, Sequence)
        if not jax.tree.leaves(null) and any(s != 1 for s in (scale if several else [scale])):
            raise ValueError(f"guidance_scale {scale} needs a condition: this model has none")
        if several:
            scale = guidance.per_step(jnp.asarray(scale, jnp.float32), timesteps)
        if strength < 1:
            if z_0 is None:
                raise ValueError(f"strength {strength} needs an image to start from")
            z_T, timesteps = guidance.image_to_image(self.schedule, z_0, timesteps, strength, start)
            if len(timesteps) == 1:
                return z_T
        run = lookup(SAMPLERS, sampler, "sampler")
        table = run.table(self.schedule, timesteps, **own)

        if cfg_pp and sampler not in CFG_PP_SAMPLERS:
            raise ValueError(f"cfg_pp works with {', '.join(CFG_PP_SAMPLERS)}, not {sampler}")
        if negative is not None and not perpendicular:
            null, negative = negative, None
        beside = [c for c, _ in more] + ([] if negative is None else [negative])
        network, (null_, first, *others) = self.prepare(table.t, shape, null, conditioning, *beside)
        schedule = self.schedule
        if tile is not None:
            network = in_tiles(network, *tile)
        denoise = _guided(
            (network, schedule, self.prediction),
            first,
            null_,
            scale,
            more=[(c, weight) for c, (_, weight) in zip(others, more, strict=False)],
            negative=None if negative is None else others[-1],
            perpendicular=perpendicular,
            cfg_pp=cfg_pp,
            interval=guidance_interval,
            rescale=guidance_rescale,
        )
        if guide is not None:
            denoise = guide(denoise)
        follow = {"recompute_eps": run.by_eps}
        if clip_x0:
            denoise = guidance.clip(denoise, schedule, -clip_x0, clip_x0, **follow)
        if dynamic_threshold:
            denoise = guidance.dynamic_threshold(denoise, schedule, dynamic_threshold, **follow)
        if nearest is not None:
            denoise = guidance.quantize(denoise, schedule, nearest, **follow)
        if preview is not None:
            denoise = guidance.with_preview(denoise, preview)
        if progress is not None:
            denoise = guidance.with_progress(denoise, progress)
        if mask is None:
            return run(denoise, z_T, timesteps, schedule, steps, **own)
        if z_0 is None:
            raise ValueError("mask needs the image around its holes")
        denoise = guidance.inpaint(denoise, schedule, z_0, mask, fill)
        return guidance.paste(run(denoise, z_T, timesteps, schedule, steps, **own), z_0, mask)


def in_tiles(network: guidance.Network, side: int, overlap: int) -> guidance.Network:
    """`network` on overlapping tiles of the latent and of what stands beside it, blended.

    For pictures whose activations don't fit. Norms and self-attention see a tile, not the whole.
    """

    def over_tiles(z_t: Array, now: Array, prepared: Prepared) -> Array:
        told, channels = prepared.conditioning, z_t.shape[-1]

        def on_tile(x: Array) -> Array:
            beside = None if told.concat is None else x[..., channels:]
            part = prepared.replace(conditioning=dataclasses.replace(told, concat=beside))
            return network(x[..., :channels], now, part)

        parts = [z_t] if told.concat is None else [z_t, told.concat]
        return tiled(on_tile, jnp.concatenate(parts, -1), side, overlap)

    return over_tiles


def _guided(
    given: tuple[guidance.Network, NoiseSchedule, str],
    conditioning: Prepared,
    null: Prepared,
    scale: Any,
    *,
    more: Sequence[tuple[Prepared, float | int]],
    negative: Prepared | None,
    perpendicular: float | int,
    cfg_pp: bool,
    interval: tuple[float | int, float | int] | None,
    rescale: float | int,
) -> guidance.Denoiser:
    """The denoiser of the one kind of guidance that is asked for.

    given: network, schedule and prediction.
    """
    kinds = {"more_prompts": more, "perpendicular": perpendicular, "cfg_pp": cfg_pp}
    chosen = [name for name, value in kinds.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} don't go together")
    if chosen and (interval is not None or rescale):
        raise ValueError(f"{chosen[0]} knows no guidance_interval or guidance_rescale")
    if more:
        conditionings = [conditioning, *(c for c, _ in more)]
        weights = [1.0, *(weight for _, weight in more)]
        return guidance.composed(*given, conditionings, weights, null, scale)
    if perpendicular:
        if negative is None:
            raise ValueError("perpendicular weighs negative_prompts: give them, too")
        return guidance.perpendicular(*given, conditioning, negative, null, scale, perpendicular)
    if cfg_pp:
        return guidance.classifier_free_pp(*given, conditioning, null, scale)
    return guidance.classifier_free(
        *given, conditioning, null, scale, interval=interval, rescale=rescale
    )


def make_denoiser(config: Config, conditioner: Conditioner, out_channels: int) -> Denoiser:
    """A denoiser without parameters yet, from the `unet` and `diffusion` fields of a config."""
    own = config["diffusion"]
    unet = make_unet(config["unet"], out_channels=out_channels)
    return Denoiser({}, schedule_of(own), unet, conditioner, own["prediction"])


def make_unet(config: Config, **own: Any) -> UNet:
    """The network that the `unet` fields of a config describe, where a dtype is a name."""
    fields = dict(config)
    fields["dtype"] = jnp.dtype(fields["dtype"]) if fields.get("dtype") else None
    return UNet(**fields, **own)


def schedule_of(config: Config) -> NoiseSchedule:
    """The noise schedule that the `diffusion` fields of a config describe."""
    return make_schedule(
        config["schedule"],
        config["num_timesteps"],
        config["beta_start"],
        config["beta_end"],
        zero_terminal_snr=config["zero_terminal_snr"],
    )
