"""The transformer over the codes of a first stage: causal, or masked.

The causal transformer is the GPT of Esser et al. 2021 (github.com/CompVis/taming-transformers);
submodules have its names. The masked transformer has the same blocks, but every position sees all
others (MaskGIT, Chang et al. 2022). A sequence has the conditions' tokens, their maps, the codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Conditioning, Float, Int
from latent_diffusion.nets.attention import CrossAttention
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import layer_norm
from latent_diffusion.nets.remat import rematerialised

Cache = tuple[Any, ...]  # (keys, values) [B S N D] of each block
_INIT = nn.initializers.normal(0.02)


def _linear(features: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_INIT, name=name)


class CodeAttention(nn.Module):
    """Self-attention with a bias in every map; causal, or over the whole sequence."""

    num_heads: int
    causal: bool = True
    dropout: float = 0.0
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L C"],
        train: bool = False,
        cache: tuple[Array, Array] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B L C"], tuple[Array, Array] | None]:
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (
            _linear(x.shape[-1], self.dtype, name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
            rows, columns = jnp.arange(x.shape[1]), jnp.arange(k.shape[1])
            visible = columns <= start + rows[:, None]
            h = jax.nn.dot_product_attention(
                q, k.astype(q.dtype), v.astype(q.dtype), mask=visible[None, None]
            )
        elif train and self.dropout:
            rng, mask = self.make_rng("dropout"), nn.make_causal_mask(x[..., 0])
            h = nn.dot_product_attention(
                q,
                k,
                v,
                mask=mask if self.causal else None,
                dropout_rng=rng,
                dropout_rate=self.dropout,
                broadcast_dropout=False,
                force_fp32_for_softmax=True,
            )
        else:
            h = attend(q, k, v, self.attention, causal=self.causal)
        return _linear(x.shape[-1], self.dtype, "proj")(h.reshape(x.shape)), cache


class CodeBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, two linear maps with a GELU."""

    num_heads: int
    causal: bool = True
    dropout: float = 0.0
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L C"],
        context: Float[Array, "B S D"] | None = None,
        train: bool = False,
        cache: tuple[Array, Array] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B L C"], tuple[Array, Array] | None]:
        width = x.shape[-1]

        def dropped(h: Array) -> Array:
            return nn.Dropout(self.dropout)(h, deterministic=not train)

        options = (self.num_heads, self.causal, self.dropout, self.attention, self.dtype)
        attention = CodeAttention(*options, name="attn")
        h, cache = attention(layer_norm("ln1")(x), train, cache, start)
        x = x + dropped(h)
        if context is not None:
            heads = (self.num_heads, width // self.num_heads)
            cross = CrossAttention(*heads, self.attention, self.dtype, name="cross_attn")
            x = x + dropped(cross(layer_norm("ln_cross")(x), context))
        h = _linear(4 * width, self.dtype, "mlp_0")(layer_norm("ln2")(x))
        h = _linear(width, self.dtype, "mlp_2")(nn.gelu(h, approximate=False))
        return x + dropped(h), cache


class CodeTransformer(nn.Module):
    """Logits of codes from the codes before them (causal) or around them (masked).

    vocab_size: rows of the table of tokens: the codes, the tokens of conditions and, in a masked
    transformer, the token of a masked code, which is the last. num_codes: columns of the logits.
    max_length: rows of the table of positions. dropout: rate for embeddings, attention, residuals.
    remat: recompute the blocks' activations in the backward pass.
    """

    vocab_size: int = 1024
    num_codes: int = 1024
    max_length: int = 512
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    causal: bool = True
    dropout: float = 0.0
    remat: bool = False
    attention: str = "auto"
    dtype: Any = None

    def setup(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"transformer.width={self.width} is not divisible by num_heads={self.num_heads}"
            )
        self.tok_emb = nn.Embed(self.vocab_size, self.width, embedding_init=_INIT)
        self.pos_emb = self.param("pos_emb", _INIT, (self.max_length, self.width))
        self.drop = nn.Dropout(self.dropout)
        block = rematerialised(self, CodeBlock, static_argnums=(3,))
        options = (self.num_heads, self.causal, self.dropout, self.attention, self.dtype)
        self.blocks = [block(*options) for _ in range(self.depth)]
        self.ln_f = layer_norm("ln_f")
        self.head = nn.Dense(self.num_codes, use_bias=False, dtype=self.dtype, kernel_init=_INIT)

    @property
    def mask_token(self) -> int:
        """The token of a masked code."""
        return self.vocab_size - 1

    def __call__(
        self,
        codes: Int[Array, "B L"],
        conditioning: Conditioning,
        train: bool = False,
        at: Int[Array, ""] | None = None,
    ) -> Float[Array, "B n K"]:
        """Logits whose position i predicts code i; with `at`, those of that position only.

        Raises ValueError for more tokens than positions, and for a causal transformer without a
        token in front of the codes.
        """
        front = front_of(conditioning, codes.shape[0])
        self.check_length(front.shape[1], codes.shape[1])
        tokens = jnp.concatenate([front, codes], 1)
        first = front.shape[1]
        if self.causal:
            tokens, first = tokens[:, :-1], first - 1
        x, _ = self._states(tokens, conditioning.context, train)
        x = x[:, first:] if at is None else jax.lax.dynamic_slice_in_dim(x, first + at, 1, 1)
        return self.head(x).astype(jnp.float32)

    def extend(
        self,
        tokens: Int[Array, "B n"],
        start: Int[Array, ""] | int,
        cache: Cache,
        context: Float[Array, "B S D"] | None,
    ) -> tuple[Float[Array, "B K"], Cache]:
        """Logits of the code after n tokens at positions from `start` on, and the extended cache.

        cache: keys and values of all earlier tokens, see `empty_cache`.
        """
        x, cache = self._states(tokens, context, False, cache, start)
        return self.head(x[:, -1]).astype(jnp.float32), cache

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Room for the keys and values of `length` tokens."""
        shape = (batch_size, length, self.num_heads, self.width // self.num_heads)
        zeros = jnp.zeros(shape, self.dtype or jnp.float32)
        return tuple((zeros, zeros) for _ in range(self.depth))

    def check_length(self, front: int, codes: int) -> None:
        """Raise ValueError if a sequence of `front` tokens and `codes` codes doesn't fit."""
        if self.causal and not front:
            raise ValueError(
                "a causal prior reads a token before the first code: "
                "give it a conditioner, such as conditioners.start = {}"
            )
        if front + codes - self.causal > self.max_length:
            raise ValueError(
                f"{front} tokens of conditions and {codes} codes exceed the prior's "
                f"transformer.max_length={self.max_length} positions"
            )

    def _states(
        self,
        tokens: Int[Array, "B L"],
        context: Float[Array, "B S D"] | None,
        train: bool,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B L C"], Cache]:
        places = jax.lax.dynamic_slice_in_dim(self.pos_emb, start, tokens.shape[1], 0)
        x = self.drop(self.tok_emb(tokens) + places, deterministic=not train)
        extended: list[Any] = []
        for block, old in zip(self.blocks, cache or [None] * self.depth, strict=True):
            x, new = block(x, context, train, old, start)
            extended.append(new)
        return self.ln_f(x), tuple(extended)


def front_of(conditioning: Conditioning, batch_size: int) -> Int[Array, "B P"]:
    """The tokens in front of the codes: those of sentences, then those of maps, row by row.

    Raises ValueError if the conditioning has another number of examples.
    """
    for x in (conditioning.tokens, conditioning.token_maps, conditioning.context):
        if x is not None and x.shape[0] != batch_size:
            raise ValueError(
                f"conditions of {x.shape[0]} examples don't fit codes of {batch_size}: give one "
                "for each"
            )
    parts = [x for x in (conditioning.tokens, conditioning.token_maps) if x is not None]
    rows = [x.reshape(batch_size, -1) for x in parts]
    return jnp.concatenate([jnp.zeros((batch_size, 0), jnp.int32), *rows], 1)
