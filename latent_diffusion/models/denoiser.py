"""The conditional denoiser: network, conditioner and noise schedule as one pytree."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import (
    Array,
    Batch,
    Bool,
    Conditioning,
    Config,
    Float,
    Num,
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
from latent_diffusion.process.schedules import NoiseSchedule, make_schedule

# Fields of a config that `schedule_of` reads.
SCHEDULE_FIELDS = ("schedule", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr")
BACKBONES: dict[str, Any] = {"unet": UNet, "dit": DiT, "mmdit": MMDiT}


class Prepared(flax.struct.PyTreeNode):
    """A conditioning, and the network's intermediate results that don't depend on the latent.

    of_context: keys and values of the cross-attention, [B ...].
    """

    conditioning: Conditioning
    of_context: Any


class Embedded(flax.struct.PyTreeNode):
    """The N timesteps of the evaluations, and the projections of their embeddings.

    of_timestep: [1 N F] if all examples share them, else empty.
    """

    t: Float[Array, " N"]
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
    ) -> tuple[Embedded, tuple[Prepared, ...]]:
        """Compute once what doesn't depend on the latent, for all timesteps t.

        shape: (h, w, c) of the latents that the network sees, which may be tiles of the whole.
        `prepared_network` takes the results. The whole network is traced to compute them; the
        compiler removes the parts whose results are unused.
        """
        params = self.params[self.name]

        @functools.partial(jax.jit, static_argnums=0)
        def compute(collection: str, t: Array, conditioning: Conditioning) -> Any:
            conditioning = _first_tile(conditioning, *shape[:2])
            leaves = jax.tree.leaves(conditioning)
            z_t = jnp.zeros((leaves[0].shape[0] if leaves else 1, *shape))
            t = jnp.broadcast_to(self.schedule.time_t(t), z_t.shape[:1])
            variables = {"params": layer_params(params)}
            _, stored = self.network.apply(variables, z_t, t, conditioning, mutable=[collection])
            return stored.get(collection, {})

        def of_timesteps(conditioning: Conditioning) -> Any:
            return jax.vmap(lambda t: compute("of_timestep", t, conditioning), out_axes=1)(t)

        # If no vector is added to the timestep's embedding, all examples share its projections.
        # Else there are B·N of them, too many to store: 25 GB for 64 pictures of DiT-XL.
        alike = all(c.vector is None and c.guidance is None for c in conditionings)
        shared = of_timesteps(jax.tree.map(lambda x: x[:1], conditionings[0])) if alike else {}
        contexts = (compute("of_context", t[0], c) for c in conditionings)
        return Embedded(t, shared), tuple(map(Prepared, conditionings, contexts))

    def prepared_network(self, embedded: Embedded) -> guidance.Network:
        """The network, which takes a `Prepared` in place of a conditioning."""
        params = self.params[self.name]

        def network(z_t: Array, now: Array, prepared: Prepared) -> Array:
            row = jnp.argmin(jnp.abs(embedded.t - now[0]))
            stored = {
                "of_context": prepared.of_context,
                "of_timestep": jax.tree.map(lambda x: x[:, row], embedded.of_timestep),
            }
            time = self.schedule.time_t(now)
            variables = {"params": layer_params(params, z_t), **stored}
            out: Any = self.network.apply(variables, z_t, time, prepared.conditioning)
            return out

        return network


def _first_tile(conditioning: Conditioning, height: int, width: int) -> Conditioning:
    """The conditioning of a latent's first rows and columns, without features of adapters."""

    def cut(x: Array) -> Array:
        return x[:, :height, :width]

    concat = None if conditioning.concat is None else cut(conditioning.concat)
    controls = tuple(dataclasses.replace(c, hint=cut(c.hint)) for c in conditioning.controls)
    return dataclasses.replace(conditioning, concat=concat, controls=controls, features=())


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
