"""CLIP's transformer layer, from which its text and image encoders are built."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from latent_diffusion.core.types import Array, Float, lookup
from latent_diffusion.nets.attention import SelfAttention
from latent_diffusion.nets.layers import Dense, layer_norm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's weights
}


class ClipLayer(nn.Module):
    """Pre-norm self-attention and a two-layer map, both residual (Radford et al. 2021).

    mlp_width: inner width of the map; None is 4 times the width of the tokens.
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
