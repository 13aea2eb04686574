"""CLIP's image embedding as a condition: variations of an image."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float, Keys
from latent_diffusion.nets.clip import ClipLayer
from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.nets.conditioners.pictures import level_and_noise
from latent_diffusion.nets.layers import Conv, Dense, layer_norm, timestep_embedding
from latent_diffusion.nets.resize import bicubic
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.process.schedules import make_schedule

# The mean and deviation of CLIP's training images in [0, 1].
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def mean_picture(side: int) -> Float[np.ndarray, "1 S S 3"]:
    """The picture that becomes zeros when the network standardises it."""
    return np.broadcast_to(2 * _MEAN - 1, (1, side, side, 3))


class ClipImage(nn.Module):
    """Vision transformer over `image` [B H W 3]; its projected class token is the context [B 1 D].

    The defaults are OpenAI's ViT-L/14 (Radford et al. 2021). The embedding is not normalised. The
    null condition is zeros.

    image_size: side of the network's input; an image of another size is resized (squashed) to it.
    projection_dim: D.
    num_levels: the number of noise levels; 0 is no noise. With levels, the embedding is
    standardised by the parameters `mean` and `std`, noised to the batch's `noise_level` (or to a
    random level) of a cosine schedule, and joined with the level's sinusoids: a vector [B 2·D].
    This is Stable Diffusion's unCLIP (Ramesh et al. 2022).
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int | None = None
    activation: str = "quick_gelu"
    projection_dim: int = 768
    num_levels: int = 0
    dtype: Any = None

    keys = ("image",)
    usual_level = 0  # the default of a sampling call

    @property
    def optional(self) -> tuple[str, ...]:
        """Keys whose values are drawn at random if the batch lacks them."""
        return ("noise_level",) if self.num_levels else ()

    @property
    def end_of_levels(self) -> int:
        """The bound below which all levels lie, random ones and those that a call gives."""
        return self.num_levels

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Draw the noise of the embedding."""
        if not self.num_levels:
            return batch
        shape = (self.projection_dim,)
        level, noise = level_and_noise("clip_image", batch, rng, self.num_levels, shape)
        return {**batch, "noise_level": level, "embedding_noise": noise}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"clip_image: image_size={self.image_size} is not divisible by "
                f"patch_size={self.patch_size}"
            )
        x = self._patches(batch["image"])
        init = nn.initializers.normal(self.width**-0.5)
        first = self.param("class_embedding", init, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], axis=1)
        x = x + self.param("position_embedding", init, x.shape[1:])
        x = layer_norm("pre_layernorm")(x)
        layer = functools.partial(ClipLayer, self.num_heads, self.mlp_width, self.activation)
        for i in range(self.depth):
            if i == self.depth - 1:
                self.sow("intermediates", "penultimate", x)  # [B L width], for IP-Adapters
            x = layer(dtype=self.dtype, name=f"layers_{i}")(x)
        x = layer_norm("post_layernorm")(x[:, :1])
        x = Dense(self.projection_dim, use_bias=False, name="visual_projection")(x)
        if not self.num_levels:
            return Conditioning(context=zeros_where(drop, x))
        return Conditioning(vector=zeros_where(drop, self._noised(x[:, 0], batch)))

    def _noised(self, embedding: Float[Array, "B D"], batch: Batch) -> Float[Array, "B E"]:
        mean = self.param("mean", nn.initializers.zeros, (self.projection_dim,))
        std = self.param("std", nn.initializers.ones, (self.projection_dim,))
        schedule, level = make_schedule("cosine", self.num_levels), batch["noise_level"]
        noised = q_sample(schedule, (embedding - mean) / std, level, batch["embedding_noise"])
        sinusoids = timestep_embedding(level, self.projection_dim)
        return jnp.concatenate([noised * std + mean, sinusoids], axis=-1)

    def _patches(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        x = bicubic(image, self.image_size, self.image_size, align_corners=True)
        x = ((x + 1) / 2 - _MEAN) / _STD
        window = (self.patch_size, self.patch_size, "VALID")
        x = Conv(self.width, *window, False, dtype=self.dtype, name="patch_embedding")(x)
        return x.reshape(len(x), -1, self.width)
