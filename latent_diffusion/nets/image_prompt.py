"""Pictures as tokens for a U-Net's cross-attention: the networks of IP-Adapters (Ye et al. 2023).

Submodules carry the names of the released files.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import Dense, layer_norm


class ImageProjection(nn.Module):
    """An embedding [B E] of a picture as [B num_tokens width]: a linear map and a norm."""

    num_tokens: int
    width: int

    @nn.compact
    def __call__(self, embedding: Float[Array, "B E"]) -> Float[Array, "B S D"]:
        h = Dense(self.num_tokens * self.width, name="proj")(embedding)
        return layer_norm("norm")(h.reshape(len(h), self.num_tokens, self.width))


class Resampler(nn.Module):
    """An encoder's tokens [B L E] as [B num_tokens width]: learned queries attend to them.

    A Perceiver (Alayrac et al. 2022): the queries attend to the tokens and to themselves, `depth`
    times, in heads of 64 channels. inner: width between input and output.
    """

    num_tokens: int
    width: int
    inner: int
    num_heads: int
    depth: int = 4

    @nn.compact
    def __call__(self, tokens: Float[Array, "B L E"]) -> Float[Array, "B S D"]:
        def linear(name: str, x: Array, width: int, use_bias: bool = False) -> Array:
            return Dense(width, use_bias, name=name)(x)

        def in_heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        init: Any = nn.initializers.normal(self.inner**-0.5)
        h = self.param("latents", init, (1, self.num_tokens, self.inner))
        h = jnp.broadcast_to(h, (len(tokens), *h.shape[1:]))
        x = linear("proj_in", tokens, self.inner, True)
        width = 64 * self.num_heads
        for layer in (f"layers_{i}" for i in range(self.depth)):
            queries = layer_norm(f"{layer}_0_norm2")(h)
            sources = jnp.concatenate([layer_norm(f"{layer}_0_norm1")(x), queries], axis=1)
            q = linear(f"{layer}_0_to_q", queries, width)
            k, v = jnp.split(linear(f"{layer}_0_to_kv", sources, 2 * width), 2, axis=-1)
            attended = attend(in_heads(q), in_heads(k), in_heads(v)).reshape(q.shape)
            h = h + linear(f"{layer}_0_to_out", attended, self.inner)
            wide = linear(f"{layer}_1_1", layer_norm(f"{layer}_1_0")(h), 4 * self.inner)
            h = h + linear(f"{layer}_1_3", nn.gelu(wide, approximate=False), self.inner)
        return layer_norm("norm_out")(linear("proj_out", h, self.width, True))
