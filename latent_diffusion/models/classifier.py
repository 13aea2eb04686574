"""A classifier of noisy latents, for class guidance of an unconditional model."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Int, Num, Params
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.schedules import NoiseSchedule


class NoisyClassifier(flax.struct.PyTreeNode):
    """Half a U-Net with a pooling head, its parameters, and the schedule it was trained with."""

    params: Params
    schedule: NoiseSchedule
    unet: UNet = flax.struct.field(pytree_node=False)

    def logits(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Float[Array, "B K"]:
        """Class scores of noisy scaled latents at timesteps t."""
        out: Any = self.unet.apply({"params": self.params}, z_t, t, None, train, rngs=rngs)
        return out

    def log_prob(
        self, z_t: Float[Array, "B h w c"], t: Num[Array, ""], labels: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        """log p(label | z_t) in nats, all at the same timestep, for `steering.by_classifier`."""
        scores = self.logits(z_t, jnp.broadcast_to(t, z_t.shape[:1]))
        return jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1)[:, 0]
