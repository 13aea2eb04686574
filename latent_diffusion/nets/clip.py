"""CLIP's transformer layer, of which its text and its image encoder are made."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.nets.attention import SelfAttention
from latent_diffusion.nets.layers import Dense
from latent_diffusion.types import Array, Float, lookup

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's weights
}


def layer_norm(name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Layer normalisation in float32, whatever the compute dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


class ClipLayer(nn.Module):
    """Pre-norm self-attention and a two-layer map, both residual (Radford et al. 2021).

    mlp_width: inner width of the map; None is 4 times the tokens'.
    """

    num_heads: int
    mlp_width: int | None = None
    activation: str = "quick_gelu"
    causal: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width = x.shape[-1]
        activation = lookup(ACTIVATIONS, self.activation, "activation")
        h = layer_norm("layer_norm1")(x).astype(x.dtype)
        x = x + SelfAttention(self.num_heads, self.causal, dtype=self.dtype, name="self_attn")(h)
        h = layer_norm("layer_norm2")(x).astype(x.dtype)
        h = Dense(self.mlp_width or 4 * width, dtype=self.dtype, name="fc1")(h)
        return x + Dense(width, dtype=self.dtype, name="fc2")(activation(h))
