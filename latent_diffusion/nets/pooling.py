"""From feature maps to class scores: four heads of a classifier on half a U-Net.

They are the heads of Dhariwal & Nichol (2021), whose classifiers guide a denoiser.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, lookup
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import Dense, GroupNorm

HIDDEN = 2048  # width of the hidden layer of spatial poolings


class Pooling(nn.Module):
    """Logits [B features] from the last feature map h and the means of all feature maps.

    kind: "adaptive" averages h over the positions; in "attention" their mean attends to them;
    "spatial" and "spatial_v2" have a hidden layer on the means of all blocks, without and with a
    norm.
    """

    kind: str
    features: int
    head_dim: int = 64
    num_groups: int = 32
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self, h: Float[Array, "B H W C"], means: list[Float[Array, "B ..."]]
    ) -> Float[Array, "B F"]:
        pools = {
            "adaptive": self._adaptive,
            "attention": self._attention,
            "spatial": self._spatial,
            "spatial_v2": self._spatial,
        }
        return lookup(pools, self.kind, "pool")(h, means).astype(jnp.float32)

    def _normed(self, h: Array) -> Array:
        return nn.silu(GroupNorm(self.num_groups, epsilon=1e-5, name="norm")(h))

    def _adaptive(self, h: Array, means: list[Array]) -> Array:
        pooled = jnp.mean(self._normed(h), (1, 2))
        return Dense(self.features, zero_init=True, dtype=self.dtype, name="proj_out")(pooled)

    def _attention(self, h: Array, means: list[Array]) -> Array:
        channels = h.shape[-1]
        if channels % self.head_dim:
            raise ValueError(
                f"pool: {channels} channels can't be split into heads of {self.head_dim}"
            )
        x = self._normed(h).reshape(h.shape[0], -1, channels)
        x = jnp.concatenate([jnp.mean(x, 1, keepdims=True), x], 1)
        init = nn.initializers.normal(channels**-0.5)
        if self.has_variable("params", "positions"):
            learned: Array = self.get_variable("params", "positions")
            if len(learned) != x.shape[1]:
                raise ValueError(
                    f"pool: a classifier with 'attention' reads latents of {len(learned) - 1} "
                    f"positions at its end, as in its training, not {x.shape[1] - 1}"
                )
        x = x + self.param("positions", init, (x.shape[1], channels))
        qkv = Dense(3 * channels, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3, -1, self.head_dim), 3, axis=2)
        pooled = attend(q[:, :1, 0], k[:, :, 0], v[:, :, 0], self.attention)
        pooled = pooled.reshape(h.shape[0], channels)
        return Dense(self.features, dtype=self.dtype, name="proj_out")(pooled)

    def _spatial(self, h: Array, means: list[Array]) -> Array:
        x = Dense(HIDDEN, dtype=self.dtype, name="hidden")(jnp.concatenate(means, -1))
        x = self._normed(x) if self.kind == "spatial_v2" else nn.relu(x)
        return Dense(self.features, dtype=self.dtype, name="proj_out")(x)
