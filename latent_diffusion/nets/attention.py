"""Attention blocks of the autoencoder and the U-Net."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Bool, Float, KeysAndValues, lookup
from latent_diffusion.nets.blocks import through
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import Dense, GroupNorm, layer_norm, precomputed


def _tokens(x: Float[Array, "B H W C"]) -> Float[Array, "B L C"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


class SingleHeadAttention2D(nn.Module):
    """The autoencoder's self-attention over positions: one head, separate maps to q, k and v."""

    num_groups: int = 32
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        h = _tokens(GroupNorm(self.num_groups, name="norm")(x))
        q, k, v = (Dense(channels, dtype=self.dtype, name=n)(h)[:, :, None, :] for n in "qkv")
        h = attend(q, k, v, self.attention)[:, :, 0, :]
        return x + Dense(channels, dtype=self.dtype, name="proj_out")(h).reshape(x.shape)


class LinearAttention2D(nn.Module):
    """Attention in O(L): softmax over the positions of k only (Shen et al. 2018), one head.

    As in the original, x isn't added to the output.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        qkv = Dense(3 * channels, use_bias=False, dtype=self.dtype, name="to_qkv")(_tokens(x))
        q, k, v = jnp.split(qkv, 3, axis=-1)
        k = nn.softmax(k.astype(jnp.float32), axis=1).astype(k.dtype)
        summary = jnp.einsum("bld,ble->bde", k, v)
        h = jnp.einsum("bld,bde->ble", q, summary)
        return Dense(channels, dtype=self.dtype, name="to_out")(h).reshape(x.shape)


class AttentionBlock(nn.Module):
    """The unconditional U-Net's self-attention: a joint map to q, k and v, several heads.

    legacy_order: released models interleave the channels by head, [h0: q k v, h1: q k v …];
    otherwise all of q comes first, then k, then v.
    """

    num_heads: int
    legacy_order: bool = True
    num_groups: int = 32
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        h = _tokens(GroupNorm(self.num_groups, epsilon=1e-5, name="norm")(x))
        qkv = Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        if self.legacy_order:
            qkv = qkv.reshape(*qkv.shape[:2], self.num_heads, 3, -1)
            q, k, v = (qkv[..., i, :] for i in range(3))
        else:
            qkv = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1)
            q, k, v = (qkv[:, :, i] for i in range(3))
        h = attend(q, k, v, self.attention).reshape(h.shape)
        h = Dense(channels, zero_init=True, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape)


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens. All maps have biases, as in CLIP and BERT.

    A joint map gives all of q, then k, then v.
    causal: a token attends to itself and earlier tokens. mask: false for tokens to ignore.
    """

    num_heads: int
    causal: bool = False
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L C"], mask: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L C"]:
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(f"width {channels} is not divisible by num_heads={self.num_heads}")
        qkv = Dense(3 * channels, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.unstack(qkv.reshape(*x.shape[:2], 3, self.num_heads, -1), axis=2)
        h = attend(q, k, v, self.attention, causal=self.causal, mask=mask).reshape(x.shape)
        return Dense(channels, dtype=self.dtype, name="out_proj")(h)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens x to `context`, or to themselves without a context.

    images: further keys and values [B S C], all heads side by side, that x attends to; each pair
    has a separate softmax, and the results are added to the context's (Ye et al. 2023).
    zero_init: the last map starts as zero, so that the attention adds nothing at first.
    """

    num_heads: int
    head_dim: int
    attention: str = "auto"
    dtype: Any = None
    zero_init: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L C"],
        context: Float[Array, "B S D"] | None = None,
        images: KeysAndValues = (),
    ) -> Float[Array, "B L C"]:
        inner = self.num_heads * self.head_dim

        def in_heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], self.num_heads, self.head_dim)

        def project(name: str, tokens: Array) -> Array:
            return in_heads(Dense(inner, use_bias=False, dtype=self.dtype, name=name)(tokens))

        def keys_and_values(tokens: Array) -> tuple[Array, Array]:
            return project("to_k", tokens), project("to_v", tokens)

        q = project("to_q", x)
        if context is None:
            k, v = keys_and_values(x)
        else:
            k, v = precomputed(self, "of_context", lambda: keys_and_values(context))
        h = attend(q, k, v, self.attention)
        for k, v in images:
            k, v = in_heads(k).astype(q.dtype), in_heads(v).astype(q.dtype)
            h = h + attend(q, k, v, self.attention)
        h = h.reshape(*x.shape[:2], inner)
        return Dense(x.shape[-1], zero_init=self.zero_init, dtype=self.dtype, name="to_out")(h)


class GEGLU(nn.Module):
    """Feed-forward with a gate: value · GELU(gate), inner width 4·C (Shazeer 2020)."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        channels = x.shape[-1]
        value, gate = jnp.split(
            Dense(8 * channels, dtype=self.dtype, name="proj_in")(x), 2, axis=-1
        )
        h = value * nn.gelu(gate, approximate=False)
        return Dense(channels, dtype=self.dtype, name="proj_out")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each pre-normalised and residual.

    self_attention: False makes the first attention a cross-attention, too, as in some released
    models at high resolutions. images: see `CrossAttention`; for the second attention.
    """

    num_heads: int
    head_dim: int
    self_attention: bool = True
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L C"],
        context: Float[Array, "B S D"] | None,
        images: KeysAndValues = (),
    ) -> Float[Array, "B L C"]:
        def norm(name: str, h: Array) -> Array:
            return layer_norm(name)(h).astype(h.dtype)

        def attention(name: str) -> CrossAttention:
            return CrossAttention(
                self.num_heads, self.head_dim, self.attention, self.dtype, name=name
            )

        x = x + attention("attn1")(norm("norm1", x), None if self.self_attention else context)
        x = x + attention("attn2")(norm("norm2", x), context, images)
        return x + GEGLU(self.dtype, name="ff")(norm("norm3", x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, conditioned on `context` tokens.

    Section 3.3 of Rombach et al. 2022. The projections are 1×1 convolutions, which on tokens are
    linear maps; released models have either kind. images: for each block, by its name.

    scan: the blocks run as a loop, which is compiled once for all of them. Parameters keep their
    names; the loop reads them from stacked copies.
    """

    num_heads: int
    head_dim: int
    depth: int = 1
    self_attention: bool = True
    num_groups: int = 32
    attention: str = "auto"
    dtype: Any = None
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Float[Array, "B S D"] | None,
        images: Mapping[str, KeysAndValues] | None = None,
    ) -> Float[Array, "B H W C"]:
        images = images or {}
        h = _tokens(GroupNorm(self.num_groups, epsilon=1e-6, name="norm")(x))
        h = Dense(self.num_heads * self.head_dim, dtype=self.dtype, name="proj_in")(h)
        block = functools.partial(
            TransformerBlock,
            self.num_heads,
            self.head_dim,
            self.self_attention,
            self.attention,
            self.dtype,
        )
        names = [f"transformer_blocks_{i}" for i in range(self.depth)]
        images_of_blocks = [(images.get(name, ()),) for name in names]
        h = through(self, block, names, h, context, scan=self.scan, own=images_of_blocks)
        h = Dense(x.shape[-1], zero_init=True, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape)


def attention_2d(attn_type: str, num_groups: int, attention: str, dtype: Any, name: str):
    """The autoencoder's attention by type: "vanilla", "linear" or "none" (the identity)."""
    table = {
        "vanilla": lambda: SingleHeadAttention2D(num_groups, attention, dtype, name=name),
        "linear": lambda: LinearAttention2D(dtype, name=name),
        "none": lambda: lambda x: x,
    }
    return lookup(table, attn_type, "attn_type")()
