"""Exact attention, a block of queries at a time, so that the scores stay in a CPU's cache.

The whole matrix of scores is never in memory: the forward pass keeps the output and the logarithm
of each row's sum, from which the backward pass makes a block's probabilities again (Rabe & Staats
2021; Dao et al. 2022). XLA does neither on CPUs.
"""

import jax
import jax.numpy as jnp

from latent_diffusion.types import Array, Float

CHUNK = 128  # queries at once


def blockwise_attention(
    q: Float[Array, "B L N D"], k: Float[Array, "B S N D"], v: Float[Array, "B S N D"]
) -> Float[Array, "B L N D"]:
    """softmax(q kᵀ / √D) v for N heads, computed in float32; the same function and gradients."""
    length, dtype = q.shape[1], q.dtype
    q, k, v = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in (q, k, v))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -length % CHUNK), (0, 0)))
    return _attend(q * q.shape[-1] ** -0.5, k, v)[:, :, :length].transpose(0, 2, 1, 3).astype(dtype)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scaled q, k, v as [B N L D], L a multiple of CHUNK."""
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
    def block(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("bnld,bnsd->bnls", q, k)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("bnls,bnsd->bnld", weights, v) / total, largest + jnp.log(total)

    out, log_sum = (_join(x) for x in jax.lax.map(block, _split(q)))
    return out, (q, k, v, out, log_sum)


def _backward(kept: tuple, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, log_sum = kept
    mean = jnp.sum(d_out * out, -1, keepdims=True)  # Σ_s p_s · ∂L/∂p_s, without p

    def block(sums: tuple, rows: tuple) -> tuple[tuple, jax.Array]:
        (d_k, d_v), (q, log_sum, d_out, mean) = sums, rows
        p = jnp.exp(jnp.einsum("bnld,bnsd->bnls", q, k) - log_sum)
        d_scores = p * (jnp.einsum("bnld,bnsd->bnls", d_out, v) - mean)
        d_k += jnp.einsum("bnls,bnld->bnsd", d_scores, q)
        d_v += jnp.einsum("bnls,bnld->bnsd", p, d_out)
        return (d_k, d_v), jnp.einsum("bnls,bnsd->bnld", d_scores, k)

    rows = tuple(_split(x) for x in (q, log_sum, d_out, mean))
    (d_k, d_v), d_q = jax.lax.scan(block, (jnp.zeros_like(k), jnp.zeros_like(v)), rows)
    return _join(d_q), d_k, d_v


_attend.defvjp(_forward, _backward)


def _split(x: jax.Array) -> jax.Array:
    """[B N L D] as blocks [L/CHUNK B N CHUNK D]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, CHUNK, x.shape[-1]), 2, 0)


def _join(blocks: jax.Array) -> jax.Array:
    x = jnp.moveaxis(blocks, 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
