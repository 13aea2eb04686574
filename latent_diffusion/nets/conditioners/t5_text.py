"""T5's encoder, the third text encoder of Stable Diffusion 3."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float, Int
from latent_diffusion.nets.conditioners.null import prompts
from latent_diffusion.nets.layers import Dense


class T5Text(nn.Module):
    """Bidirectional transformer: `tokens` [B L] → context [B L width] (Raffel et al. 2020).

    The defaults are version 1.1's XXL: gated feed-forward maps, norms without mean and bias, and an
    attention bias for each distance, which all layers share. As in Stable Diffusion 3, padding
    isn't masked. Where `tokens` are of several encoders, the last max_length are T5's.

    buckets, max_distance: the rows of the table of biases, and the distance from which all
    distances share a row. empty, pad_id: a dropped example reads the empty prompt: `empty`, then
    `pad_id`. absent: for a model without this encoder; the context is zeros. dtype: with float16,
    the sums of layers stay in float32, since those of XXL are beyond its range.
    """

    vocab_size: int = 32128
    max_length: int = 256
    width: int = 4096
    depth: int = 24
    num_heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10240
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    empty: Sequence[int] = (1,)
    pad_id: int = 0
    absent: bool = False
    dtype: Any = None

    table = "shared/embedding"  # has a row for each word

    @property
    def keys(self) -> tuple[str, ...]:
        """The batch key that is read."""
        return () if self.absent else ("tokens",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        if self.absent:
            return Conditioning(context=jnp.zeros((len(drop), self.max_length, self.width)))
        t5_batch = {"tokens": batch["tokens"][:, -self.max_length :]}
        tokens = prompts("t5_text", t5_batch, drop, self.max_length, self.empty, self.pad_id)
        init = nn.initializers.normal(1.0)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="shared")(tokens)
        x = x.astype(_of_sums(self.dtype) or x.dtype)
        table = self.param(
            "relative_attention_bias", nn.initializers.normal(0.02), (self.buckets, self.num_heads)
        )
        bias = table[buckets(self.max_length, self.buckets, self.max_distance)]
        for i in range(self.depth):
            x = T5Layer(
                self.num_heads,
                self.head_dim,
                self.mlp_width,
                self.epsilon,
                self.dtype,
                name=f"layers_{i}",
            )(x, bias.transpose(2, 0, 1))
        return Conditioning(context=_norm("final_layer_norm", self.epsilon)(x))


class T5Layer(nn.Module):
    """Pre-norm self-attention and a gated map, both residual, without biases.

    The scores of attention aren't divided by √D.
    """

    num_heads: int
    head_dim: int
    mlp_width: int
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "N L L"]
    ) -> Float[Array, "B L D"]:
        h = _norm("layer_norm_0", self.epsilon)(x)
        inner, shape = self.num_heads * self.head_dim, (*x.shape[:2], self.num_heads, -1)
        q, k, v = (self._map(name, inner)(h).reshape(shape) for name in "qkv")
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k).astype(jnp.float32) + bias
        h = jnp.einsum("bnqk,bknd->bqnd", nn.softmax(scores).astype(v.dtype), v)
        x = x + self._map("o", x.shape[-1])(h.reshape(*x.shape[:2], inner))

        h = _norm("layer_norm_1", self.epsilon)(x)
        gate = nn.gelu(self._map("wi_0", self.mlp_width)(h), approximate=True)
        h = gate * self._map("wi_1", self.mlp_width)(h)
        return x + self._map("wo", x.shape[-1], _of_sums(self.dtype))(h)

    def _map(self, name: str, features: int, dtype: Any = None) -> Dense:
        return Dense(features, use_bias=False, dtype=dtype or self.dtype, name=name)


def _of_sums(dtype: Any) -> Any:
    """The type of the sum of layers, and of what feed-forward maps add to it."""
    return jnp.float32 if dtype is not None and jnp.dtype(dtype) == jnp.float16 else dtype


def _norm(name: str, epsilon: float) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def buckets(length: int, count: int, max_distance: int) -> Int[np.ndarray, "L L"]:
    """The row of the table of biases for each query and key.

    One half of the rows is for keys behind the query. Within a half, the first half of the rows are
    single distances, and the others grow in proportion to the distance up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = count // 2, count // 4
    away = np.abs(distance).astype(np.float32)
    ratio = np.log(np.maximum(away, exact) / exact) / np.float32(np.log(max_distance / exact))
    far = exact + (ratio * (half - exact)).astype(np.int32)
    rows = np.where(away < exact, away, np.minimum(far, half - 1))
    return (half * (distance > 0) + rows).astype(np.int32)
