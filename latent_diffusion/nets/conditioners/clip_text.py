"""CLIP's text encoder: what Stable Diffusion 1 and 2 are conditioned on."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from latent_diffusion.nets.clip import ClipLayer, layer_norm
from latent_diffusion.nets.conditioners.null import empty_where
from latent_diffusion.types import Array, Batch, Bool, Conditioning


class ClipText(nn.Module):
    """Causal transformer over `tokens`; all its states, normalised, are the context [B L width].

    The defaults are OpenAI's ViT-L/14 (Radford et al. 2021); OpenCLIP's ViT-H/14 has width 1024,
    depth 24, 16 heads and activation "gelu". Padding is attended to, as the released models do.

    mlp_width: inner width of the feed-forward maps; None is 4·width.
    activation: "quick_gelu" or "gelu".
    skip_last: layers at the end that are left out: 1 is the penultimate layer's states, as Stable
    Diffusion 2 takes them. The final norm is applied in any case.
    empty, pad_id: the tokenizer's empty prompt, begin and end, and what follows them; examples that
    are dropped read so. Stable Diffusion 2 pads with 0.
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
        tokens = batch["tokens"]
        if tokens.shape[1] != self.max_length:
            raise ValueError(
                f"clip_text: {tokens.shape[1]} tokens a prompt, "
                f"expected max_length={self.max_length}"
            )
        tokens = empty_where(drop, tokens, self.empty, self.pad_id)
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")
        x = embed(tokens) + self.param("position_embedding", init, (self.max_length, self.width))
        x = x if self.dtype is None else x.astype(self.dtype)
        for i in range(self.depth - self.skip_last):
            x = ClipLayer(
                self.num_heads,
                self.mlp_width,
                self.activation,
                causal=True,
                dtype=self.dtype,
                name=f"layers_{i}",
            )(x)
        return Conditioning(context=layer_norm("final_layer_norm")(x))
