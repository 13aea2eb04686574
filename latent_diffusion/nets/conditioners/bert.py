"""A sentence encoder: BERT and its distillations, e.g. MiniLM, usually pretrained and frozen."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float
from latent_diffusion.nets.attention import SelfAttention
from latent_diffusion.nets.conditioners.null import empty_where
from latent_diffusion.nets.layers import Dense, layer_norm

_EPSILON = 1e-12


class Bert(nn.Module):
    """Bidirectional post-norm transformer over `tokens` [B L] (Devlin et al. 2019).

    The defaults are MiniLM-L6 (Wang et al. 2020). In contrast to the other text encoders, padding
    is masked.

    max_positions: rows of the table of positions, the largest L.
    mlp_width: inner width of the feed-forward maps; None is 4·width.
    pooling: "tokens" gives the states of all tokens as the context [B L width]; "mean" gives their
    mean over the prompt, by which sentences are compared, as one token [B 1 width].
    empty, pad_id: a dropped example reads the empty prompt: the tokens `empty` ([CLS] and [SEP]),
    then `pad_id`.
    """

    vocab_size: int = 30522
    max_positions: int = 512
    type_vocab_size: int = 2
    width: int = 384
    depth: int = 6
    num_heads: int = 12
    mlp_width: int | None = None
    pooling: str = "tokens"
    empty: Sequence[int] = (101, 102)
    pad_id: int = 0
    dtype: Any = None

    keys = ("tokens",)
    table = "word_embeddings/embedding"  # has a row for each word

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = batch["tokens"]
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"bert: {length} tokens a prompt, at most max_positions={self.max_positions}"
            )
        tokens = empty_where(drop, tokens, self.empty, self.pad_id)
        is_word = tokens != self.pad_id
        x = self._table("word_embeddings", self.vocab_size)(tokens)
        x = x + self._table("token_type_embeddings", self.type_vocab_size).embedding[0]
        x = x + self._table("position_embeddings", self.max_positions).embedding[:length]
        x = layer_norm("norm", _EPSILON)(x)
        for i in range(self.depth):
            x = BertLayer(self.num_heads, self.mlp_width, self.dtype, name=f"layers_{i}")(
                x, is_word
            )
        if self.pooling == "tokens":
            return Conditioning(context=x)
        if self.pooling == "mean":
            weight = is_word[:, :, None].astype(jnp.float32)
            mean = jnp.sum(weight * x, 1, keepdims=True) / jnp.sum(weight, 1, keepdims=True)
            return Conditioning(context=mean)
        raise ValueError(f"bert.pooling={self.pooling!r}; known: tokens, mean")

    def _table(self, name: str, rows: int) -> nn.Embed:
        return nn.Embed(rows, self.width, embedding_init=nn.initializers.normal(0.02), name=name)


class BertLayer(nn.Module):
    """Self-attention and a two-layer map, both residual, each followed by a norm."""

    num_heads: int
    mlp_width: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], is_word: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        width = x.shape[-1]
        h = SelfAttention(self.num_heads, dtype=self.dtype, name="self_attn")(x, is_word)
        x = layer_norm("norm1", _EPSILON)(x + h)
        h = Dense(self.mlp_width or 4 * width, dtype=self.dtype, name="fc1")(x)
        h = Dense(width, dtype=self.dtype, name="fc2")(nn.gelu(h, approximate=False))
        return layer_norm("norm2", _EPSILON)(x + h)
