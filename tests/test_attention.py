"""Attention by blocks is attention: values and gradients, whatever the length and the dtype."""

import functools
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.nets import attention, dot_product_attention
from latent_diffusion.nets.blockwise_attention import blockwise_attention
from latent_diffusion.nets.dot_product_attention import Machine, attend, choose, traced_for
from latent_diffusion.nets.splash_attention import splash_attention


@pytest.mark.parametrize(("length", "keys"), [(256, 256), (200, 77)])  # one block, and four
def test_blocks_equal_the_whole_with_gradients(length, keys):
    blocks = functools.partial(blockwise_attention, scores=256 * 256 if length == 256 else 4000)
    k_q, k_k, k_v, k_w = jax.random.split(jax.random.key(0), 4)
    q = 3 * jax.random.normal(k_q, (2, length, 2, 4))
    k, v = (jax.random.normal(key, (2, keys, 2, 4)) for key in (k_k, k_v))
    weight = jax.random.normal(k_w, q.shape)

    def loss(attend, q, k, v):
        out = attend(q, k, v)
        return jnp.sum(out * weight), out

    values = []
    for function in (blocks, jax.nn.dot_product_attention):
        grad = jax.jit(jax.grad(lambda *a, f=function: loss(f, *a), (0, 1, 2), has_aux=True))
        values.append(grad(q, k, v))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *values)


def draws(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def test_heads_first_equals_the_whole():
    q, k, v = draws((2, 9, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(attend(q, k, v, "heads_first"), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"mask": jnp.array([[True] * 3 + [False] * 2])}, {"causal": True}]
)
def test_half_precision_has_masks_too(options):
    half = draws((2, 5, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), dtype=jnp.float16)
    whole = [x.astype(jnp.float32) for x in half]
    got = attend(*half, **options)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, attend(*whole, **options), atol=2e-3)


CPU, TPU = Machine("cpu"), Machine("tpu")
A100, H100, ROCM = Machine("gpu", (8, 0)), Machine("gpu", (9, 0)), Machine("gpu")


@pytest.mark.parametrize(
    ("machine", "dtype", "length", "keys", "width", "chosen"),
    [
        # Stable Diffusion 1 at 512²: heads of 40, 80 and 160 at 4,096, 1,024 and 256 positions
        (H100, jnp.bfloat16, 4096, 4096, 40, "cudnn"),
        (H100, jnp.bfloat16, 4096, 77, 40, "cudnn"),
        (H100, jnp.float16, 1024, 1024, 80, "cudnn"),
        (H100, jnp.bfloat16, 256, 256, 160, "cudnn"),
        (A100, jnp.bfloat16, 1024, 1024, 80, "cudnn"),
        (A100, jnp.bfloat16, 256, 256, 160, "xla"),  # more than 128 numbers
        (A100, jnp.bfloat16, 4096, 4096, 160, "blocks"),
        (TPU, jnp.bfloat16, 4096, 4096, 40, "splash"),
        (TPU, jnp.bfloat16, 4096, 77, 40, "xla"),
        (TPU, jnp.bfloat16, 1024, 1024, 80, "xla"),
        # Stable Diffusion 2 and XL: heads of 64
        (A100, jnp.bfloat16, 9216, 9216, 64, "cudnn"),
        (A100, jnp.bfloat16, 9216, 77, 64, "cudnn"),
        (TPU, jnp.float32, 4096, 4096, 64, "splash"),
        # a first stage: one head of 512 numbers
        (H100, jnp.bfloat16, 4096, 4096, 512, "blocks"),
        (H100, jnp.bfloat16, 1024, 1024, 512, "xla"),
        (TPU, jnp.bfloat16, 16384, 16384, 512, "splash"),
        # no 16-bit numbers, no NVIDIA
        (H100, jnp.float32, 4096, 4096, 64, "blocks"),
        (H100, jnp.float32, 1024, 1024, 64, "xla"),
        (ROCM, jnp.bfloat16, 1024, 1024, 64, "xla"),
        (Machine("gpu", (7, 5)), jnp.float16, 1024, 1024, 64, "xla"),
        # CPUs
        (CPU, jnp.float32, 1024, 1024, 8, "blocks"),
        (CPU, jnp.bfloat16, 400, 400, 8, "blocks"),
        (CPU, jnp.float32, 1024, 77, 8, "heads_first"),
        (CPU, jnp.bfloat16, 256, 256, 8, "xla"),
    ],
)
def test_auto_is_a_rule_of_the_machine_the_dtype_and_the_sizes(
    machine, dtype, length, keys, width, chosen
):
    assert choose(machine, dtype, length, keys, width) == chosen
    assert choose(machine, dtype, length, keys, width, masked=True) == "xla"
    causal = choose(machine, dtype, length, keys, width, causal=True)
    assert causal == ("cudnn" if chosen == "cudnn" else "xla")


def test_auto_follows_the_rule_of_this_machine_or_of_the_one_that_is_traced_for(monkeypatch):
    seen = []
    name, real = "blocks", dot_product_attention.IMPLEMENTATIONS["blocks"]
    spy = {name: lambda q, k, v, **options: seen.append(q) or real(q, k, v)}
    monkeypatch.setattr(
        dot_product_attention, "IMPLEMENTATIONS", dot_product_attention.IMPLEMENTATIONS | spy
    )

    def blocks(length, keys, implementation="auto"):
        q = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        k = jax.ShapeDtypeStruct((1, keys, 1, 4), jnp.float32)
        seen.clear()
        jax.eval_shape(lambda q, k: attend(q, k, k, implementation), q, k)
        return len(seen)

    assert blocks(1024, 1024) == 1 and blocks(8, 8, "blocks") == 1
    assert blocks(1024, 77) == blocks(256, 256) == blocks(1024, 1024, "xla") == 0
    with traced_for(H100):
        assert blocks(1024, 1024) == 0 and blocks(4096, 4096) == 1
    assert blocks(1024, 1024) == 1


def test_splash_is_attention_and_for_tpus_only():
    """Whatever the lengths and the width, which fill the kernel's blocks or don't."""
    for length, keys in ((150, 77), (128, 128)):
        q, k, v = draws((1, length, 1, 40), (1, keys, 1, 40), (1, keys, 1, 40))
        expected = jax.nn.dot_product_attention(3 * q, k, v)
        got = splash_attention(3 * q, k, v, interpret=True)
        np.testing.assert_allclose(got, expected, atol=2e-5)
    for name, kind in (("splash", "TPUs"), ("cudnn", "GPUs")):
        with pytest.raises(ValueError, match=f"attention='{name}' is for {kind}, this is a cpu"):
            attend(q, k, v, name)
    with traced_for(TPU):
        causal = attend(k, k, v, "splash", causal=True)
    np.testing.assert_array_equal(causal, attend(k, k, v, "xla", causal=True))


@pytest.fixture
def cudnn_is_here(monkeypatch):
    """JAX lowers cuDNN's attention where it finds cuDNN: let it find one."""
    kernel = inspect.unwrap(jax.nn.dot_product_attention).__globals__["cudnn_dot_product_attention"]
    names = inspect.unwrap(kernel).__globals__
    monkeypatch.setitem(names, "check_cudnn_version", lambda: 91000)
    monkeypatch.setitem(names, "check_compute_capability", lambda version: True)
    monkeypatch.setitem(names, "is_cuda_compute_capability_equal", lambda version: False)


def lowered(machine, platform, heads, width, side):
    """The program of the gradient of a transformer over side² positions in bfloat16."""
    channels = heads * width
    block = attention.SpatialTransformer(heads, width, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, side, side, channels), jnp.bfloat16)
    context = jax.ShapeDtypeStruct((2, 77, 768), jnp.bfloat16)
    params = jax.eval_shape(block.init, jax.random.key(0), x, context)

    def loss(params, x, context):
        return jnp.sum(block.apply(params, x, context).astype(jnp.float32))

    with traced_for(machine):
        traced = jax.jit(jax.grad(loss)).trace(params, x, context)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("heads", "width", "side"), [(8, 40, 64), (10, 64, 64), (8, 160, 16)])
def test_programs_for_cuda_hold_cudnns_kernels_and_no_scores(heads, width, side, cudnn_is_here):
    text = lowered(H100, "cuda", heads, width, side)
    for kernel in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert text.count(f"@{kernel}(") == 2  # of positions, and of the context
    scores = rf"x{side**2}x({side**2}|77|80)x"
    assert not re.search(scores, text)
    if side == 16:
        assert re.search(scores, lowered(A100, "cuda", heads, width, side))  # XLA writes them


@pytest.mark.parametrize(("heads", "width"), [(8, 40), (10, 64)])
def test_programs_for_tpus_hold_splash_and_no_scores(heads, width):
    text = lowered(TPU, "tpu", heads, width, 64)
    assert text.count("@tpu_custom_call(") == 3  # forward, and two backward
    assert not re.search("x4096x4096x", text)


def test_what_cudnn_gets_is_padded_and_what_it_gives_is_cut(monkeypatch):
    """cuDNN's arguments, computed by XLA: values and gradients are those without padding."""
    real, seen = jax.nn.dot_product_attention, []

    def by_xla(q, k, v, implementation, **options):
        if implementation == "cudnn":
            seen.append((q.shape, k.shape, options["key_value_seq_lengths"] is None))
        return real(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)

    @jax.jit
    def differences(q, k, v):
        def loss(implementation, causal, q, k, v):
            out = real(q, k, v, is_causal=causal)
            if implementation == "cudnn":
                out = attend(q, k, v, "cudnn", causal=causal)
            return jnp.sum(jnp.sin(out)), out

        def answers(*args):
            return jax.grad(loss, (2, 3, 4), has_aux=True)(*args)

        pairs = [
            [answers(name, causal, first, k, v) for name in ("cudnn", "xla")]
            for first, causal in ((q, False), (k, True))
        ]
        return [jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *pair) for pair in pairs]

    with traced_for(H100):
        worst = differences(*draws((1, 9, 2, 20), (1, 13, 2, 20), (1, 13, 2, 20)))
    assert max(jax.tree.leaves(worst)) < 1e-5
    assert seen[0] == ((1, 16, 2, 24), (1, 16, 2, 24), False)
    whole = draws((1, 16, 2, 8), (1, 8, 2, 8), (1, 8, 2, 8))
    with traced_for(H100):
        jax.eval_shape(lambda q, k, v: attend(q, k, v, "cudnn"), *whole)
    assert seen[-1] == ((1, 16, 2, 8), (1, 8, 2, 8), True)


def test_blocks_are_larger_where_a_cache_need_not_hold_them():
    """An H200 took four times as long for blocks of 256 rows as for the whole."""
    q = jax.ShapeDtypeStruct((1, 4096, 1, 512), jnp.bfloat16)
    for machine, rows in ((CPU, 256), (H100, 1024)):
        with traced_for(machine):
            text = str(jax.make_jaxpr(lambda x: attend(x, x, x, "blocks"))(q))
        sizes = {int(n) for n in re.findall(r"f32\[(\d+),4096\] = dot_general", text)}
        assert sizes == {rows}


def test_blocks_keep_the_dtype_and_sum_in_float32():
    q = jax.random.normal(jax.random.key(0), (1, 128, 1, 8), jnp.bfloat16)
    out = blockwise_attention(q, q, q)
    assert out.dtype == jnp.bfloat16
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, q, q)))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


@jax.enable_x64(True)  # some outputs are near zero, where sums in float32 differ by the machine
def test_a_loop_over_blocks_is_the_blocks_by_the_same_parameters():
    """Operation by operation exactly, and compiled but for rounding, with gradients; with
    activations recomputed; and with keys and values made before."""
    rng = np.random.default_rng(0)
    fields = {"num_heads": 2, "head_dim": 2, "depth": 3, "num_groups": 2, "dtype": jnp.float64}
    module = attention.SpatialTransformer
    plain, loop = module(**fields), module(**fields, scan=True)
    recomputed = nn.remat(module)(**fields, scan=True)
    x = jnp.asarray(rng.normal(size=(2, 2, 3, 4)))
    context = jnp.asarray(rng.normal(size=(2, 5, 6)))
    shapes = jax.eval_shape(plain.init, jax.random.key(0), x, context)
    assert shapes == jax.eval_shape(loop.init, jax.random.key(0), x, context)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape)), shapes)

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


def test_linear_attention_is_its_output_alone_as_in_the_original():
    """to_out(q · Σ softmax(k) v), to which x isn't added (CompVis, ldm/modules/attention.py)."""
    module, rng = attention.LinearAttention2D(), np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = module.init(jax.random.key(0), jnp.asarray(x))["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    q, k, v = np.split(x.reshape(2, 12, 5) @ params["to_qkv"]["kernel"], 3, axis=2)
    weights = np.exp(k) / np.exp(k).sum(1, keepdims=True)
    mixed = q @ np.einsum("bld,ble->bde", weights, v)
    want = mixed @ params["to_out"]["kernel"] + params["to_out"]["bias"]
    got = module.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want.reshape(x.shape), rtol=1e-4, atol=1e-4)
