"""CLIP's text encoder, the condition of Stable Diffusion 1 and 2."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.clip import ClipLayer
from latent_diffusion.nets.conditioners.null import prompts
from latent_diffusion.nets.layers import layer_norm
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Float, Int


class ClipText(nn.Module):
    """Causal transformer: `tokens` [B L] → context [B L width], the states of all its tokens.

    The defaults are OpenAI's ViT-L/14 (Radford et al. 2021); OpenCLIP's ViT-H/14 has width 1024,
    depth 24, 16 heads and activation "gelu". As in the released models, padding is attended to.

    mlp_width: inner width of the feed-forward maps; None is 4·width.
    activation: "quick_gelu" or "gelu".
    skip_last: the number of last layers that are left out; Stable Diffusion 2 has 1, so it takes
    the states of the penultimate layer. The final norm follows in any case.
    With `tokens_weights` [B L], L is any multiple of max_length: each chunk of max_length tokens is
    encoded alone, and a token's state x becomes e + weight·(x − e), where e is the state at its
    place in the empty prompt.
    empty, pad_id: an example that is dropped reads the empty prompt: the tokens `empty` (begin and
    end), then `pad_id` (Stable Diffusion 2: 0).
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

    keys = ("tokens",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        weights = batch.get("tokens_weights")
        if weights is not None:
            batch, drop = self._chunks(batch["tokens"], drop)
        tokens = prompts("clip_text", batch, drop, self.max_length, self.empty, self.pad_id)
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")
        x = embed(tokens) + self.param("position_embedding", init, (self.max_length, self.width))
        x = x if self.dtype is None else x.astype(self.dtype)
        layer = functools.partial(ClipLayer, self.num_heads, self.mlp_width, self.activation)
        for i in range(self.depth - self.skip_last):
            x = layer(causal=True, dtype=self.dtype, name=f"layers_{i}")(x)
        x = layer_norm("final_layer_norm")(x)
        if weights is not None:
            x = _weighted(x[1:], x[:1], weights.reshape(-1, self.max_length, 1))
            x = x.reshape(*weights.shape, self.width)
        return Conditioning(context=x)

    @nn.nowrap
    def _chunks(
        self, tokens: Int[Array, "B nL"], drop: Bool[Array, " B"]
    ) -> tuple[Batch, Bool[Array, " C"]]:
        """The chunks of the prompts, one below the other, and an empty prompt above them."""
        chunks = tokens.reshape(-1, self.max_length)
        drop = jnp.repeat(drop, len(chunks) // len(tokens))
        tokens = jnp.concatenate([chunks[:1], chunks])
        return {"tokens": tokens}, jnp.concatenate([jnp.ones(1, bool), drop])


def _weighted(
    x: Float[Array, "C L D"], empty: Float[Array, "1 L D"], weights: Float[Array, "C L 1"]
) -> Float[Array, "C L D"]:
    return jnp.where(weights == 1, x, empty + weights * (x - empty))
