"""CLIP's image embedding as a condition: variations of an image."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from latent_diffusion.conditioners.null import zeros_where
from latent_diffusion.models.clip import ClipLayer, layer_norm
from latent_diffusion.models.layers import Conv, Dense
from latent_diffusion.models.resize import bicubic_aligned
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Float

# Of CLIP's training images in [0, 1].
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class ClipImage(nn.Module):
    """Vision transformer over `image`; its projected class token is the context [B 1 D].

    The defaults are OpenAI's ViT-L/14 (Radford et al. 2021). The embedding is not normalised; an
    example that is dropped has zeros instead.

    image_size: side of what the network sees; images of other sizes are resized, squashed.
    projection_dim: D.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int | None = None
    activation: str = "quick_gelu"
    projection_dim: int = 768
    dtype: Any = None

    keys = ("image",)

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
        for i in range(self.depth):
            x = ClipLayer(
                self.num_heads,
                self.mlp_width,
                self.activation,
                dtype=self.dtype,
                name=f"layers_{i}",
            )(x)
        x = layer_norm("post_layernorm")(x[:, :1])
        x = Dense(self.projection_dim, use_bias=False, name="visual_projection")(x)
        return Conditioning(context=zeros_where(drop, x))

    def _patches(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        x = bicubic_aligned(image, self.image_size, self.image_size)
        x = ((x + 1) / 2 - _MEAN) / _STD
        x = Conv(
            self.width,
            self.patch_size,
            self.patch_size,
            "VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(x)
        return x.reshape(len(x), -1, self.width)
