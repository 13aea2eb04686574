"""A trained text transformer: the encoder of the paper's text-to-image model."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from latent_diffusion.nets.attention import CrossAttention
from latent_diffusion.nets.conditioners.null import empty_where
from latent_diffusion.nets.layers import Dense
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Float


class TextTransformer(nn.Module):
    """Bidirectional pre-norm transformer over `tokens`, without a padding mask (paper App. E.2.1).

    The released models attend to the padding, and are unconditional on the empty string; so do
    and are these: `empty` are its tokens before the padding with `pad_id`: none with the word
    tokenizer, (101, 102) with BERT's. The inner attention width is num_heads·head_dim at any width.
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

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = batch["tokens"]
        if tokens.shape[1] != self.max_length:
            raise ValueError(
                f"text: {tokens.shape[1]} tokens a prompt, expected max_length={self.max_length}"
            )
        tokens = empty_where(drop, tokens, self.empty, self.pad_id)
        init = nn.initializers.normal(self.width**-0.5)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_emb")(tokens)
        x = x + self.param("pos_emb", init, (self.max_length, self.width))
        for i in range(self.depth):
            x = x + self._attention(i, x)
            x = x + self._feed_forward(i, x)
        return Conditioning(context=self._norm("norm", x))

    def _norm(self, name: str, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return nn.LayerNorm(epsilon=1e-5, name=name)(x)

    def _attention(self, i: int, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        h = self._norm(f"layers_{2 * i}_norm", x)
        return CrossAttention(
            self.num_heads, self.head_dim, dtype=self.dtype, name=f"layers_{2 * i}_attn"
        )(h)

    def _feed_forward(self, i: int, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        h = self._norm(f"layers_{2 * i + 1}_norm", x)
        h = Dense(4 * self.width, dtype=self.dtype, name=f"layers_{2 * i + 1}_net_0")(h)
        h = nn.gelu(h, approximate=False)
        return Dense(self.width, dtype=self.dtype, name=f"layers_{2 * i + 1}_net_2")(h)
