"""The conditional denoiser: U-Net, conditioner and noise schedule as one pytree that samples."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.conditioners import Conditioner
from latent_diffusion.guidance import classifier_free
from latent_diffusion.models.unet import UNet
from latent_diffusion.rng import normal_per_example, split_per_example
from latent_diffusion.samplers import SAMPLERS
from latent_diffusion.schedules import NoiseSchedule, Timesteps, make_schedule
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

    def sample(
        self,
        keys: Keys,
        conditioning: Conditioning,
        null: Conditioning,
        timesteps: Timesteps,
        shape: tuple[int, int, int],
        *,
        sampler: str = "ddim",
        guidance_scale: float = 1.0,
        z_T: Float[Array, "B h w c"] | None = None,
        **own: Any,
    ) -> Float[Array, "B h w c"]:
        """Scaled latents by a whole sampling loop; traceable, so that it compiles as one program.

        keys: one per image, which alone decides its noise. null: the unconditional conditioning.
        timesteps: [S+1] from `schedules.spacing`. shape: (h, w, c). own: options of the sampler.
        """
        start, steps = split_per_example(keys, 2)
        z_T = normal_per_example(start, shape) if z_T is None else z_T
        denoise = classifier_free(
            self.denoise, self.schedule, self.prediction, conditioning, null, guidance_scale
        )
        run = lookup(SAMPLERS, sampler, "sampler")
        return run(denoise, z_T, timesteps, self.schedule, steps, **own)


def make_denoiser(config: Config, conditioner: Conditioner, out_channels: int) -> Denoiser:
    """A denoiser without parameters yet, from the `unet` and `diffusion` fields of a config."""
    own = config["diffusion"]
    schedule = make_schedule(
        own["schedule"],
        own["num_timesteps"],
        own["beta_start"],
        own["beta_end"],
        zero_terminal_snr=own["zero_terminal_snr"],
    )
    fields = dict(config["unet"])
    fields["dtype"] = jnp.dtype(fields["dtype"]) if fields["dtype"] else None
    unet = UNet(out_channels=out_channels, **fields)
    return Denoiser({}, schedule, unet, conditioner, own["prediction"])
