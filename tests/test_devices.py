"""Both train steps on eight devices: the same numbers in all modes, and nothing wasted."""

import functools
import re

import jax
import numpy as np
import pytest
from programs import host_transfers
from tiny import make_batch, make_config

from latent_diffusion.core.rng import init_key
from latent_diffusion.core.trees import path_string
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.parallel import hlo
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

RNG = jax.random.key(7)
STEPS = 5
REST = (".*", "fsdp(min_mb=0.002)")  # small arrays stay whole: every cut costs compile time here
RULES = (
    (r"(conv2|to_out|proj_out|out_layers_3)/kernel", "tensor(-2)"),
    (r"(conv1|to_[qkv]|in_layers_2)/kernel", "tensor(-1)"),
    REST,
)
RULES_OF_PRIOR = (
    (r"(proj|mlp_2)/kernel", "tensor(-2)"),
    (r"(query|key|value|mlp_0|head)/kernel", "tensor(-1)"),
    REST,
)
# A bias before a norm has rounding noise for a gradient; eps keeps Adam from magnifying it.
COMMON = {"optimizer.eps": 1e-2, "optimizer.learning_rate": 1e-3}
BOTH = ("autoencoding", "denoising", "prior")
OWN = {
    "autoencoding": {"autoencoding.reduction": "mean"},
    "denoising": {},
    "prior": {"transformer.dropout": 0.0, "prior.pkeep": 0.8},
}
LESS_MEMORY = {
    "autoencoding": {"grad_accumulation": 2, "autoencoder.remat": True},
    "denoising": {"grad_accumulation": 2, "unet.remat": "full"},
    "prior": {"grad_accumulation": 2, "transformer.remat": True},
}


def rules_of(task):
    return RULES_OF_PRIOR if task == "prior" else RULES


def _make(task, **fields):
    config = make_config(task, **COMMON, **OWN[task], **fields)
    return TASKS[task](config), config


@functools.cache
def _start(task):
    made, config = _make(task)
    init = jax.jit(lambda rng: made.init(rng, batch_spec(config)))
    return *init(init_key(0)), make_batch(config)


@functools.cache
def _run(task, name):
    """(state, metrics) after five steps, the compiled program, and the bytes of the state."""
    first, constants, batch = _start(task)
    mode, sizes, rules, fields = {
        "single": ("single", None, (), {}),
        "pmap": ("pmap", None, (), {}),
        "mesh": ("mesh", {"data": 2, "fsdp": 2, "tensor": 2}, rules_of(task), LESS_MEMORY[task]),
    }[name]
    mesh = parallel.make_mesh(sizes) if sizes else None
    step = parallel.compile_step(_make(task, **fields)[0].train_step, mode, mesh=mesh, rules=rules)
    state = parallel.place(jax.tree.map(np.asarray, first), mode, mesh, rules)
    num_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    compiled = step.lower(state, constants, batch, RNG).compile()
    for _ in range(STEPS):  # a program that fits its own results never compiles anew
        state, metrics = compiled(*step.arguments(state, constants, batch, RNG))
    return jax.tree.map(np.asarray, (state, metrics)), compiled, num_bytes


@pytest.mark.parametrize("name", ["pmap", "mesh"])
@pytest.mark.parametrize("task", BOTH)
def test_all_modes_take_the_same_steps(task, name):
    (want, got), first = (_run(task, mode)[0] for mode in ("single", name)), _start(task)[0]
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(want[0].params), strict=True)
    ]
    assert max(moved) > 1e-3
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, a), b in zip(paths, jax.tree.leaves(got), strict=True):
        scale = max(1.0, float(np.abs(a).max()))
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * scale, err_msg=path_string(path))


@pytest.mark.parametrize("name", ["single", "pmap", "mesh"])
@pytest.mark.parametrize("task", BOTH)
def test_the_step_is_clean(task, name):
    _, compiled, num_bytes = _run(task, name)
    text = compiled.as_text()
    assert host_transfers(text) == []
    assert "f64[" not in text
    assert compiled.memory_analysis().alias_size_in_bytes == num_bytes  # all of it, in place
    if name == "single":
        assert hlo.collectives(text) == []
    first = _start(task)[0]
    trained = (first.params, getattr(first, "disc_params", ()))
    gradients = parallel.num_bytes(trained)
    reduced = [c for c in hlo.collectives(text) if c.kind == "all-reduce"]
    if name == "pmap":  # each player's gradients cross the network once, and together
        players = 2 if task == "autoencoding" else 1
        assert {c.kind for c in hlo.collectives(text)} == {"all-reduce"}
        assert 1 <= sum(c.num_bytes > 0.1 * gradients for c in reduced) <= players
        crossed = sum(c.num_bytes * c.times for c in reduced)
        assert 0.99 * gradients <= crossed <= 1.2 * gradients


@pytest.mark.parametrize("task", BOTH)
def test_bfloat16_has_no_accidental_float32_products(task):
    names = {
        "autoencoding": ["autoencoder.dtype"],
        "denoising": ["autoencoder.dtype", "unet.dtype", "conditioners.text.dtype"],
        "prior": ["autoencoder.dtype", "transformer.dtype"],
    }[task]
    made, config = _make(task, **dict.fromkeys(names, "bfloat16"))
    state, constants = jax.eval_shape(made.init, RNG, batch_spec(config))
    lowered = jax.jit(made.train_step).lower(state, constants, batch_spec(config), RNG).as_text()
    products = re.findall(
        r"stablehlo\.(?:dot_general|convolution).*: \((.*)\) -> (tensor<.*?>)", lowered
    )
    assert len(products) > 20
    # JAX's attention multiplies a softmax's gradient, in float32, by keys in bfloat16.
    full = [" ".join(product) for product in products if "bf16" not in product[0]]
    # The discriminator, which has kernels of 4×4, and the search for the nearest of codes [16 2]
    # compute in float32.
    meant = {"autoencoding": r"tensor<4x4x\d+x\d+xf32>", "prior": r"tensor<2x16xf32>"}
    assert all(re.search(meant.get(task, "nothing"), types) for types in full)
    assert bool(full) == (task in meant)


def test_flops_are_counted_with_their_loops():
    w, x = np.ones((8, 8), np.float32), np.ones((4, 8), np.float32)

    def loop(w, x):
        body = jax.checkpoint(lambda carry: jax.nn.silu(carry @ w))
        return jax.lax.scan(lambda carry, _: (body(carry), None), x, None, length=5)[0].sum()

    assert parallel.count_flops(loop, w, x) == 5 * (2 * 4 * 8 * 8)
    # Once more forward, and two products backward.
    assert parallel.count_flops(jax.grad(loop), w, x) == 4 * 5 * (2 * 4 * 8 * 8)


def test_products_that_nobody_uses_are_not_counted():
    """Compilers remove them, as they do the outputs of a network that only fills its cache."""
    w, x = jax.numpy.zeros((8, 8)), jax.numpy.zeros((4, 8))
    both = jax.jit(lambda x: (x @ w, (x + 1) @ w))
    assert parallel.count_flops(both, x) == 2 * (2 * 4 * 8 * 8)
    assert parallel.count_flops(lambda x: both(x)[0], x) == 2 * 4 * 8 * 8


def test_of_branches_the_dearest_counts_and_of_spread_pictures_what_is_no_zero():
    w, x = np.ones((8, 8), np.float32), np.ones((4, 8), np.float32)

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert parallel.count_flops(branches, x) == 2 * (2 * 4 * 8 * 8)

    def spread(x, kernel):
        padding, dimensions = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=dimensions
        )

    # Each of 4 × 4 pixels with 2 features meets each of 2 × 2 taps with 3 outputs.
    picture, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((2, 2, 2, 3), np.float32)
    assert parallel.count_flops(spread, picture, kernel) == 2 * (4 * 4 * 2) * (2 * 2 * 3)
