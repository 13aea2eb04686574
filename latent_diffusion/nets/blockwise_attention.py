"""Exact attention, a head and a block of queries at a time, so that scores stay in a CPU's cache.

The whole matrix of scores is never in memory. The forward pass saves the output and the logarithm
of each row's sum; from these the backward pass computes the probabilities of a block again (Rabe &
Staats 2021; Dao et al. 2022). XLA does neither on CPUs. There, sums along the last axis are slow
and matrix products fast: so a column of ones beside the values gives the softmax's denominator, and
the backward pass has keys in rows, so that no product needs transposed scores.
"""

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float

SCORES = 2**20  # 4 MB, which a CPU's cache holds


def blockwise_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    scores: int = SCORES,
) -> Float[Array, "B L N D"]:
    """softmax(q kᵀ / √D) v for N heads, computed in float32; its gradients are exact, too.

    scores: about the largest number of scores in a block.
    """
    batch, length, heads, width = q.shape
    num_blocks = -(-length * k.shape[1] // scores)

    def by_head(x: Array) -> Array:
        return x.astype(jnp.float32).swapaxes(1, 2).reshape(-1, x.shape[1], width)

    rows = jnp.pad(by_head(q) * width**-0.5, ((0, 0), (0, -length % num_blocks), (0, 0)))
    rows = rows.reshape(batch * heads, num_blocks, -1, width)
    out = jax.lax.map(lambda head: _head(*head), (rows, by_head(k), by_head(v)))
    out = out.reshape(batch, heads, -1, width)[:, :, :length]
    return out.swapaxes(1, 2).astype(q.dtype)


@jax.custom_vjp
def _head(q: Float[Array, "M C D"], k: Float[Array, "S D"], v: Float[Array, "S D"]) -> Array:
    """The attention [M C D] of a head, for scaled queries in M blocks."""
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    v_and_ones = jnp.concatenate([v, jnp.ones_like(v[:, :1])], -1)

    def block(q: Array) -> tuple[Array, Array]:
        scores = q @ k.T
        largest = scores.max(-1, keepdims=True)
        out = jnp.exp(scores - largest) @ v_and_ones
        total = out[:, -1:]
        return out[:, :-1] / total, (largest + jnp.log(total))[:, 0]

    out, log_sum = jax.lax.map(block, q)
    return out, (q, k, v, out, log_sum)


def _backward(saved: tuple, d_out: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, log_sum = saved
    mean = jnp.sum(d_out * out, -1)  # Σ_s p_s · ∂L/∂p_s, without p

    def block(sums: tuple, rows: tuple) -> tuple[tuple, Array]:
        (d_k, d_v), (q, log_sum, d_out, mean) = sums, rows
        p = jnp.exp(k @ q.T - log_sum)  # [S C]
        d_scores = p * (v @ d_out.T - mean)
        return (d_k + d_scores @ q, d_v + p @ d_out), k.T @ d_scores  # [D C]

    zeros = (jnp.zeros_like(k), jnp.zeros_like(v))
    (d_k, d_v), d_q = jax.lax.scan(block, zeros, (q, log_sum, d_out, mean))
    return d_q.swapaxes(1, 2), d_k, d_v


_head.defvjp(_forward, _backward)
