"""Objects in boxes, as a sentence of tokens read by a trained transformer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.conditioners.text import TextTransformer
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Int


def sentences(name: str, batch: Batch, max_length: int) -> Int[Array, "B L"]:
    """The batch's `layout`; ValueError in a conditioner's name where it has another length."""
    tokens = batch["layout"]
    if tokens.shape[1] != max_length:
        raise ValueError(f"{name}: {tokens.shape[1]} tokens, expected max_length={max_length}")
    return tokens


class Layout(nn.Module):
    """`layout` [B L] (see `data.layout`) → context: the transformer of the text condition.

    The released model has 8192 tokens and 92 places: 30 objects of three tokens, and the crop.
    Null: the last token everywhere, which is the layout without objects.
    """

    vocab_size: int = 8192
    max_length: int = 92
    width: int = 512
    depth: int = 16
    num_heads: int = 8
    head_dim: int = 64
    dtype: Any = None

    keys = ("layout",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = sentences("layout", batch, self.max_length)
        tokens = jnp.where(drop[:, None], self.vocab_size - 1, tokens)
        encoder = TextTransformer(
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            name="transformer",
        )
        return encoder({"tokens": tokens}, jnp.zeros_like(drop))
