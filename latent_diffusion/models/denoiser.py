"""The conditional denoiser: U-Net, conditioner and noise schedule as one pytree that samples."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.rng import SamplingKeys, normal_per_example
from latent_diffusion.core.types import (
    Array,
    Batch,
    Bool,
    Conditioning,
    Config,
    Float,
    Num,
    Number,
    Params,
    lookup,
    module_fields,
)
from latent_diffusion.nets.conditioners import Conditioner
from latent_diffusion.nets.dit import DiT
from latent_diffusion.nets.eight_bits import layer_params
from latent_diffusion.nets.mmdit import MMDiT
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process import guidance
from latent_diffusion.process.constraints import constrained
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.plan import own_options
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps, make_schedule
from latent_diffusion.process.tiling import tiled

# Fields of a config that `schedule_of` reads.
SCHEDULE_FIELDS = ("schedule", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr")
BACKBONES: dict[str, Any] = {"unet": UNet, "dit": DiT, "mmdit": MMDiT}


class Prepared(flax.struct.PyTreeNode):
    """A conditioning, and the network's intermediate results that don't depend on the latent.

    of_context: keys and values of the cross-attention, [B ...]. of_timestep: projections of the
    timestep embedding at all N timesteps, [B N F]; None if all examples share them.
    """

    conditioning: Conditioning
    of_context: Any
    of_timestep: Any


class Denoiser(flax.struct.PyTreeNode):
    """Modules, schedule and parameters {name, "conditioner"} of a trained (or training) model.

    prediction: the quantity that the network predicts: "eps", "x0", "v", "flow" or "edm". name: the
    network's name in BACKBONES, and the key of its parameters and of its fields in a config.
    """

    params: Params
    schedule: NoiseSchedule
    network: nn.Module = flax.struct.field(pytree_node=False)
    conditioner: Conditioner = flax.struct.field(pytree_node=False)
    prediction: str = flax.struct.field(pytree_node=False)
    name: str = flax.struct.field(pytree_node=False, default="unet")

    def condition(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        """The conditioning of a batch; unconditional where `drop` is true."""
        params = layer_params(self.params.get("conditioner", {}))
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
        out: Any = self.network.apply(
            {"params": layer_params(self.params[self.name])},
            z_t,
            self.schedule.time_t(t),
            conditioning,
            train,
            rngs=rngs,
        )
        return out

    def with_variance(self, field: str) -> "Denoiser":
        """The denoiser whose network also returns its learned variance, in the last half.

        field: the option that needs it, for the ValueError if the network has not learned it.
        """
        if not getattr(self.network, "learned_variance", False):
            raise ValueError(f"{field} needs a network with dit.learned_variance")
        network: Any = self.network
        return self.replace(network=network.with_variance())

    def prepare(
        self,
        t: Float[Array, " N"],
        shape: tuple[int, int, int],
        *conditionings: Conditioning,
    ) -> tuple[guidance.Network, tuple[Prepared, ...]]:
        """Compute everything that doesn't depend on the latent once, for all timesteps t.

        Returns a network that takes a `Prepared` in place of a conditioning, and a `Prepared` for
        every conditioning. The whole network is traced to compute them; the compiler removes the
        parts whose results are unused.
        """
        params = self.params[self.name]

        @functools.partial(jax.jit, static_argnums=0)
        def compute(collection: str, t: Array, conditioning: Conditioning) -> Any:
            leaves = jax.tree.leaves(conditioning)
            z_t = jnp.zeros((leaves[0].shape[0] if leaves else 1, *shape))
            t = jnp.broadcast_to(self.schedule.time_t(t), z_t.shape[:1])
            variables = {"params": layer_params(params)}
            _, stored = self.network.apply(variables, z_t, t, conditioning, mutable=[collection])
            return stored.get(collection, {})

        def of_timesteps(conditioning: Conditioning) -> Any:
            return jax.vmap(lambda t: compute("of_timestep", t, conditioning), out_axes=1)(t)

        # If no vector is added to the timestep's embedding, all examples share its projections.
        alike = all(c.vector is None and c.guidance is None for c in conditionings)
        shared = of_timesteps(jax.tree.map(lambda x: x[:1], conditionings[0])) if alike else None

        def network(z_t: Array, now: Array, prepared: Prepared) -> Array:
            row = jnp.argmin(jnp.abs(t - now[0]))
            of_timestep = shared if alike else prepared.of_timestep
            stored = {
                "of_context": prepared.of_context,
                "of_timestep": jax.tree.map(lambda x: x[:, row], of_timestep),
            }
            time = self.schedule.time_t(now)
            variables = {"params": layer_params(params, z_t), **stored}
            out: Any = self.network.apply(variables, z_t, time, prepared.conditioning)
            return out

        return network, tuple(
            Prepared(c, compute("of_context", t[0], c), None if alike else of_timesteps(c))
            for c in conditionings
        )

    def sample(
        self,
        keys: SamplingKeys,
        conditioning: Conditioning,
        null: Conditioning,
        timesteps: Timesteps,
        shape: tuple[int, int, int],
        options: SamplingOptions,
        *,
        negative: Conditioning | None = None,
        more: Sequence[tuple[Conditioning, Number]] = (),
        nearest: Callable[[Array], Array] | None = None,
        z_T: Float[Array, "B h w c"] | None = None,
        z_0: Float[Array, "B h w c"] | None = None,
        mask: Float[Array, "B h w 1"] | None = None,
        guide: Callable[[Any], Any] | None = None,
        tile: tuple[int, int] | None = None,
    ) -> Float[Array, "B h w c"]:
        """Scaled latents by a whole sampling loop; traceable, so that it compiles as one program.

        keys: from `sampling_keys`; an image's noise depends only on its keys. null: the
        unconditional conditioning. timesteps, options: from `process.plan.plan`. shape: (h, w, c).
        negative: replaces null, or is avoided with the weight `options.perpendicular`. more:
        further conditionings and their weights, beside the first of weight 1. nearest: replaces
        estimates of z_0 by their closest codes. z_T: start noise instead of fresh noise. z_0: a
        picture's latents; with `options.strength` its coarse part stays, with mask (1 = hole) the
        part outside holes. guide: wraps the denoiser, see `steering`. tile: (side, overlap) of the
        tiles of the latent on which the network runs; None: it runs on the whole.
        """
        if options.learned_variance:
            self = self.with_variance("learned_variance")
        if (count := options.guidance_channels or 0) > shape[-1]:
            raise ValueError(f"guidance_channels={count}: the latent has {shape[-1]} channels")
        if getattr(self.network, "guidance_dim", None) is not None:
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
        if options.strength is not None or (late and z_T is None):
            z = q_sample(self.schedule, picture, timesteps[0], z)
            if len(timesteps) == 1:
                return z
        elif not late:  # if late, z_T already has the noise of the first timestep
            spread = {"unit": lambda t: 1.0, "sigma": self.schedule.sigma_t}
            z = lookup(spread, options.spread or "unit", "spread")(timesteps[0]) * z
        run = SAMPLERS[options.sampler]
        sampler_options = own_options(options)
        evaluated = run.table(self.schedule, timesteps, **sampler_options).t
        rounded = lookup(
            guidance.ROUNDINGS, options.network_timesteps or "exact", "network_timesteps"
        )
        others = [c for c, _ in more] + ([] if negative is None else [negative])
        network, prepared = self.prepare(rounded(evaluated), shape, null, conditioning, *others)
        network = guidance.at_timesteps(network, rounded)
        denoise = guidance.guided(
            network if tile is None else in_tiles(network, *tile),
            self.schedule,
            self.prediction,
            prepared[: 2 + len(more)],
            options,
            timesteps,
            [weight for _, weight in more],
            None if negative is None else prepared[-1],
        )
        if guide is not None:
            denoise = guide(denoise)
        denoise = constrained(denoise, self.schedule, options, nearest, run.by_eps)
        denoise = guidance.observed(denoise, options.progress, options.preview)
        if mask is not None:
            denoise = guidance.inpaint(denoise, self.schedule, picture, mask, keys.hole)
        step_keys = keys.steps
        if late:  # draw other noise than the call that stopped here
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, timesteps[0].astype(int))
        z = run(denoise, z, timesteps, self.schedule, step_keys, **sampler_options)
        if mask is None or options.end is not None:
            return z
        return guidance.paste(z, picture, mask)


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


def make_denoiser(config: Config, conditioner: Conditioner, out_channels: int) -> Denoiser:
    """A denoiser without parameters, from a config's fields of the backbone and of `diffusion`."""
    diffusion, name = config["diffusion"], config["backbone"]
    lookup(BACKBONES, name, "backbone")
    network = make_network(name, config[name], out_channels=out_channels)
    prediction = diffusion["prediction"]
    return Denoiser({}, schedule_of(diffusion), network, conditioner, prediction, name)


def make_network(name: str, config: Config, **more: Any) -> Any:
    """The network `name` of BACKBONES with the fields of a config, in which dtypes are names."""
    return BACKBONES[name](**module_fields(config), **more)


def schedule_of(config: Config) -> NoiseSchedule:
    """The noise schedule that the `diffusion` fields of a config describe."""
    name, num_timesteps, beta_start, beta_end, zero_snr = (config[f] for f in SCHEDULE_FIELDS)
    return make_schedule(name, num_timesteps, beta_start, beta_end, zero_terminal_snr=zero_snr)
