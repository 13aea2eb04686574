"""CLIP's text encoder, the condition of Stable Diffusion 1, 2 and (twice) XL."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float, Int
from latent_diffusion.nets.clip import ClipLayer
from latent_diffusion.nets.conditioners.null import prompts, zeros_where
from latent_diffusion.nets.layers import Dense, layer_norm


class ClipText(nn.Module):
    """Causal transformer: `tokens` [B L] → context [B L width], the states of all its tokens.

    The defaults are OpenAI's ViT-L/14 (Radford et al. 2021); OpenCLIP's ViT-H/14 has width 1024,
    depth 24, 16 heads and activation "gelu". As in the released models, padding isn't masked.

    mlp_width: inner width of the feed-forward maps; None is 4·width.
    activation: "quick_gelu" or "gelu".
    skip_last: the number of last layers that don't affect the context; with 1, as in Stable
    Diffusion 2, it is the states of the penultimate layer. final_norm: apply the final norm to the
    context; Stable Diffusion XL doesn't.
    With `tokens_weights` [B L], L is any multiple of max_length: each chunk of max_length tokens is
    encoded separately, and a token's state x becomes e + weight·(x − e), where e is the state at
    the same position of the empty prompt. The vector is that of the first chunk.
    empty, pad_id: a dropped example reads the empty prompt: the tokens `empty` (begin and end),
    then `pad_id` (Stable Diffusion 2: 0). zero_null: it gets zeros instead.
    projection_dim: also give a vector [B projection_dim], a linear map of the last layer's state at
    the end of the text, after the final norm (Stable Diffusion XL's second encoder).
    repad: replace tokens after the end of the text by `pad_id`; another encoder of the same tokens
    may need another padding.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int | None = None
    activation: str = "quick_gelu"
    skip_last: int = 0
    empty: Sequence[int] = (49406, 49407)
    pad_id: int = 49407
    dtype: Any = None
    final_norm: bool = True
    projection_dim: int | None = None
    zero_null: bool = False
    repad: bool = False

    keys = ("tokens",)
    table = "token_embedding/embedding"  # has a row for each word

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        weights = batch.get("tokens_weights")
        dropped = drop
        if weights is not None:
            batch, dropped = self._chunks(batch["tokens"], drop)
        tokens = prompts("clip_text", batch, dropped, self.max_length, self.empty, self.pad_id)
        ends = tokens == self.empty[-1]
        if self.repad:
            before = jnp.cumsum(ends, axis=1) - ends  # ends before each token
            tokens = jnp.where(before > 0, self.pad_id, tokens)
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")
        x = embed(tokens) + self.param("position_embedding", init, (self.max_length, self.width))
        x = x if self.dtype is None else x.astype(self.dtype)
        layer = functools.partial(ClipLayer, self.num_heads, self.mlp_width, self.activation)
        used, states = self.depth - self.skip_last, [x]
        for i in range(used if self.projection_dim is None else self.depth):
            states.append(layer(causal=True, dtype=self.dtype, name=f"layers_{i}")(states[-1]))
        if self.final_norm or self.projection_dim is not None:
            norm = layer_norm("final_layer_norm")
        context = norm(states[used]) if self.final_norm else states[used]
        vector = None
        if self.projection_dim is not None:
            first = jnp.argmax(ends, axis=1)
            pooled = norm(states[-1][jnp.arange(len(first)), first])
            fields: dict[str, Any] = {"use_bias": False, "dtype": self.dtype}
            vector = Dense(self.projection_dim, **fields, name="text_projection")(pooled)
        if weights is not None:
            context = _weighted(context[1:], context[:1], weights.reshape(-1, self.max_length, 1))
            context = context.reshape(*weights.shape, self.width)
            chunks = weights.shape[1] // self.max_length
            vector = None if vector is None else vector[1::chunks]
        if self.zero_null:
            context = zeros_where(drop, context)
            vector = None if vector is None else zeros_where(drop, vector)
        return Conditioning(context=context, vector=vector)

    @nn.nowrap
    def _chunks(
        self, tokens: Int[Array, "B nL"], drop: Bool[Array, " B"]
    ) -> tuple[Batch, Bool[Array, " C"]]:
        """A batch of an empty prompt and all chunks of the prompts, and which rows are empty."""
        chunks = tokens.reshape(-1, self.max_length)
        drop = jnp.repeat(drop, len(chunks) // len(tokens))
        tokens = jnp.concatenate([chunks[:1], chunks])
        return {"tokens": tokens}, jnp.concatenate([jnp.ones(1, bool), drop])


def _weighted(
    x: Float[Array, "C L D"], empty: Float[Array, "1 L D"], weights: Float[Array, "C L 1"]
) -> Float[Array, "C L D"]:
    return jnp.where(weights == 1, x, empty + weights * (x - empty))
