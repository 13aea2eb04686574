"""Attention by blocks is attention: values and gradients, whatever the length and the dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.nets import attention
from latent_diffusion.nets import blockwise_attention as by_blocks
from latent_diffusion.nets.blockwise_attention import blockwise_attention
from latent_diffusion.nets.splash_attention import splash_attention


@pytest.mark.parametrize(("length", "keys"), [(256, 256), (200, 77)])  # one block, and four
def test_blocks_equal_the_whole_with_gradients(length, keys, monkeypatch):
    monkeypatch.setattr(by_blocks, "SCORES", 256 * 256 if length == 256 else 4000)
    k_q, k_k, k_v, k_w = jax.random.split(jax.random.key(0), 4)
    q = 3 * jax.random.normal(k_q, (2, length, 2, 4))
    k, v = (jax.random.normal(key, (2, keys, 2, 4)) for key in (k_k, k_v))
    weight = jax.random.normal(k_w, q.shape)

    def loss(attend, q, k, v):
        out = attend(q, k, v)
        return jnp.sum(out * weight), out

    values = []
    for attend in (blockwise_attention, jax.nn.dot_product_attention):
        grad = jax.jit(jax.grad(lambda *a, f=attend: loss(f, *a), (0, 1, 2), has_aux=True))
        values.append(grad(q, k, v))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *values)


def test_heads_first_equals_the_whole():
    q, k, v = (
        jax.random.normal(key, (2, 9, 2, 4)) for key in jax.random.split(jax.random.key(0), 3)
    )
    expected = jax.nn.dot_product_attention(q, k[:, :5], v[:, :5])
    np.testing.assert_allclose(attention.heads_first(q, k[:, :5], v[:, :5]), expected, atol=1e-6)


def test_only_long_sequences_on_a_cpu_go_by_blocks(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "blockwise_attention", lambda q, k, v: seen.append(q) or q)

    def attend(length, keys, implementation="auto"):
        q = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        k = jax.ShapeDtypeStruct((1, keys, 1, 4), jnp.float32)
        seen.clear()
        jax.eval_shape(lambda q, k: attention.attend(q, k, k, implementation), q, k)
        return len(seen)

    assert attend(1024, 1024) == 1
    assert attend(1024, 77) == attend(256, 256) == attend(1024, 1024, "xla") == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attend(1024, 1024) == 0


def test_splash_is_attention_and_for_tpus_only():
    """Whatever the lengths and the width, none of which fill the kernel's blocks here."""
    k_q, k_k, k_v = jax.random.split(jax.random.key(0), 3)
    q = 3 * jax.random.normal(k_q, (1, 150, 2, 40))
    k, v = (jax.random.normal(key, (1, 77, 2, 40)) for key in (k_k, k_v))
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(splash_attention(q, k, v, interpret=True), expected, atol=2e-5)
    with pytest.raises(ValueError, match="attention='splash' is for TPUs, this is a cpu"):
        attention.attend(q, k, v, "splash")
    causal = attention.attend(k, k, v, "splash", causal=True)
    np.testing.assert_array_equal(causal, attention.attend(k, k, v, "xla", causal=True))


def test_blocks_keep_the_dtype_and_sum_in_float32():
    q = jax.random.normal(jax.random.key(0), (1, 128, 1, 8), jnp.bfloat16)
    out = blockwise_attention(q, q, q)
    assert out.dtype == jnp.bfloat16
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, q, q)))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_a_loop_over_blocks_is_the_blocks_by_the_same_parameters():
    """Operation by operation exactly, and compiled but for rounding, with gradients; with
    activations recomputed; and with keys and values made before."""
    rng = np.random.default_rng(0)
    fields = {"num_heads": 2, "head_dim": 2, "depth": 3, "num_groups": 2}
    module = attention.SpatialTransformer
    plain, loop = module(**fields), module(**fields, scan=True)
    recomputed = nn.remat(module)(**fields, scan=True)
    x = jnp.asarray(rng.normal(size=(2, 2, 3, 4)), jnp.float32)
    context = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), x, context)
    assert shapes == jax.eval_shape(loop.init, jax.random.key(0), x, context)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes)

    def answer(block):
        def loss(params):
            out = block.apply(params, x, context)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    grads, out = answer(plain)
    for block in (loop, recomputed):
        got, seen = answer(block)
        np.testing.assert_allclose(seen, out, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), got, grads)
    with jax.disable_jit():
        np.testing.assert_array_equal(*(b.apply(params, x, context) for b in (plain, loop)))
    _, known = loop.apply(params, x, context, mutable=["of_context"])
    again = jax.jit(loop.apply)({**params, **known}, x, jnp.zeros_like(context))
    np.testing.assert_allclose(again, out, rtol=1e-5)  # and the context isn't read any more
    programs = [str(jax.make_jaxpr(block.apply)(params, x, context)) for block in (plain, loop)]
    assert [program.count("scan[") for program in programs] == [0, 1]
    assert [program.count("erfc") for program in programs] == [3, 1]  # a GELU for each block
