"""The transformer that the paper trains with its denoiser, over captions and over layouts."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Int
from latent_diffusion.nets.attention import CrossAttention
from latent_diffusion.nets.conditioners.null import prompts
from latent_diffusion.nets.layers import Dense, layer_norm


class TextTransformer(nn.Module):
    """Bidirectional pre-norm transformer: `tokens` [B L] → context [B L width] (App. E.2.1).

    As in the released models, padding isn't masked, and a dropped example reads the empty prompt:
    the tokens `empty`, then `pad_id`. `empty` is () with the word tokenizer, and (101, 102) with
    BERT's. The inner width of attention is num_heads·head_dim, for any width.
    """

    vocab_size: int = 30522
    max_length: int = 77
    width: int = 1280
    depth: int = 32
    num_heads: int = 8
    head_dim: int = 64
    empty: Sequence[int] = ()
    pad_id: int = 0
    dtype: Any = None

    keys = ("tokens",)
    table = "token_emb/embedding"  # has a row for each word

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = prompts("text", batch, drop, self.max_length, self.empty, self.pad_id)
        init, heads = nn.initializers.normal(self.width**-0.5), (self.num_heads, self.head_dim)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_emb")(tokens)
        x = x + self.param("pos_emb", init, (self.max_length, self.width))
        for i in range(self.depth):
            attention, mlp = f"layers_{2 * i}", f"layers_{2 * i + 1}"
            h = layer_norm(f"{attention}_norm")(x)
            x = x + CrossAttention(*heads, dtype=self.dtype, name=f"{attention}_attn")(h)
            h = layer_norm(f"{mlp}_norm")(x)
            h = Dense(4 * self.width, dtype=self.dtype, name=f"{mlp}_net_0")(h)
            h = nn.gelu(h, approximate=False)
            x = x + Dense(self.width, dtype=self.dtype, name=f"{mlp}_net_2")(h)
        return Conditioning(context=layer_norm("norm")(x))


def sentences(name: str, batch: Batch, max_length: int) -> Int[Array, "B L"]:
    """The batch's `layout`. Raises ValueError, with the conditioner's name, for another length."""
    tokens = batch["layout"]
    if tokens.shape[1] != max_length:
        raise ValueError(f"{name}: {tokens.shape[1]} tokens, expected max_length={max_length}")
    return tokens


class Layout(nn.Module):
    """Objects in boxes: `layout` [B L] (see `data.layout`) → context [B L width].

    The released model has 8192 tokens and 92 positions: 30 objects of three tokens, and the crop.
    The null condition is the last token at all positions, which is the layout without objects.
    centres, encode_crop: the fields of a run's `data.layout` for its sentences, which sampling
    reads. None: the length tells whether the crop is in it, if objects have three tokens.
    """

    vocab_size: int = 8192
    max_length: int = 92
    width: int = 512
    depth: int = 16
    num_heads: int = 8
    head_dim: int = 64
    dtype: Any = None
    centres: bool = False
    encode_crop: bool | None = None

    keys = ("layout",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = sentences("layout", batch, self.max_length)
        tokens = jnp.where(drop[:, None], self.vocab_size - 1, tokens)
        sizes = (self.vocab_size, self.max_length, self.width, self.depth)
        heads = (self.num_heads, self.head_dim)
        encoder = TextTransformer(*sizes, *heads, dtype=self.dtype, name="transformer")
        return encoder({"tokens": tokens}, jnp.zeros_like(drop))
