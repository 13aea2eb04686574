"""Attention by JAX's splash kernel for TPUs, for any number of tokens and any width of a head."""

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float

MULTIPLE = 128  # the kernel needs multiples of this many tokens and channels
BLOCK = 512  # at most this many queries, and keys, are in the kernel at a time


def splash_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    interpret: bool = False,
) -> Float[Array, "B L N D"]:
    """softmax(q kᵀ / √D) v for N heads; scores never leave the chip.

    interpret: run the kernel step by step on any device, as a test does.
    """
    length, width = q.shape[1], q.shape[3]
    real = k.shape[1]
    q, k, v = (_padded(x.transpose(0, 2, 1, 3)) for x in (q * width**-0.5, k, v))
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], interpret)
    # Padding belongs to another segment, to which no query attends.
    segments = None if real == k.shape[2] else _segment_ids(q.shape[2], k.shape[2], real)
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)
    return out[:, :, :length, :width].transpose(0, 2, 1, 3)


def _padded(x: Float[Array, "B N L D"]) -> Float[Array, "B N M E"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % MULTIPLE), (0, -x.shape[3] % MULTIPLE)))


def _block(tokens: int) -> int:
    """The largest block size that divides `tokens`."""
    return next(size for size in range(BLOCK, 0, -MULTIPLE) if tokens % size == 0)


def _kernel(heads: int, length: int, keys: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    mask = splash_attention_mask.FullMask((length, keys))
    query_block, key_block = _block(length), _block(keys)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        interpret=interpret,
    )


def _segment_ids(length: int, keys: int, real: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel.SegmentIds(
        q=jnp.zeros(length, jnp.int32), kv=(jnp.arange(keys) >= real).astype(jnp.int32)
    )
