import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.core.rng import init_key
from latent_diffusion.nets.discriminator import NORMS, ActNorm, PatchGAN


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_variables(net, x):
    """Variables with the statistics as initialised and parameters of visible size."""
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    flat, tree = jax.tree.flatten(variables["params"])
    params = [0.3 * normal(seed, *leaf.shape) for seed, leaf in enumerate(flat)]
    stats = {
        ("batch_stats", *path): jnp.full(leaf.shape, float(path[-1] in ("var", "gain")))
        for path, leaf in flatten_dict(variables["batch_stats"]).items()
    }
    return {"params": tree.unflatten(params), **unflatten_dict(stats)}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("num_layers", "side", "millions"), [(1, 126, None), (2, 62, 0.663), (3, 30, 2.766)]
)
def test_logits_and_parameters_of_the_paper(num_layers, side, millions):
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    net = PatchGAN(num_layers=num_layers)
    logits, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), image)
    assert logits.shape == (1, side, side, 1)
    if millions is not None:
        assert round(count(variables["params"]) / 1e6, 3) == millions
    # The smallest image that gives a logit, and one pixel less.
    smallest = jax.ShapeDtypeStruct((1, 3 * 2**num_layers, 3 * 2**num_layers, 3), jnp.float32)
    logits, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), smallest)
    assert logits.shape == (1, 1, 1, 1)
    image = jax.ShapeDtypeStruct((1, 64, smallest.shape[1] - 1, 3), jnp.float32)
    with pytest.raises(ValueError, match=f"at least {smallest.shape[1]} pixels a side"):
        jax.eval_shape(net.init, jax.random.key(0), image)


def test_a_logit_sees_a_patch_of_34_pixels():
    """Two layers: moving pixels outside the 34x34 window leaves the logit alone, inside not."""
    net = PatchGAN(channels=4, num_layers=2)
    x = normal(0, 1, 64, 64, 3)
    variables = random_variables(net, x)
    # Logit i covers the pixels 4i − 11 ... 4i + 22 (kernels 4, strides 2 2 1 1, paddings 1).
    gradient = jax.jit(jax.grad(lambda x: net.apply(variables, x)[0, 6, 6, 0]))(x)
    touched = np.flatnonzero(np.abs(gradient).sum((0, 2, 3)))
    np.testing.assert_array_equal(touched, np.arange(24 - 11, 24 + 23))


def test_unknown_norm_lists_the_known_ones():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match="unknown PatchGAN norm 'layer'; known: actnorm, batch"):
        jax.eval_shape(PatchGAN(norm="layer").init, jax.random.key(0), image)


def test_initial_weights_follow_the_paper():
    net = PatchGAN(channels=32, num_layers=1)
    key = init_key(0)
    params = net.init(key, jnp.zeros((1, 6, 6, 3)))["params"]
    kernel, scale = params["conv1"]["kernel"], params["norm1"]["scale"]
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=1e-3)
    np.testing.assert_allclose([scale.mean(), scale.std()], [1, 0.02], atol=1e-2)
    assert not params["norm1"]["bias"].any() and "bias" not in params["conv1"]


@pytest.mark.parametrize("norm", NORMS)
def test_training_moves_statistics_only_if_the_caller_keeps_them(norm):
    x = 3 + normal(0, 2, 6, 6, 3)
    net = PatchGAN(channels=4, num_layers=1, norm=norm)
    variables = random_variables(net, x)
    evaluate = jax.jit(net.apply)
    before = evaluate(variables, x)
    _, moved = jax.jit(lambda v: net.apply(v, x, train=True, mutable=["batch_stats"]))(variables)
    np.testing.assert_array_equal(evaluate(variables, x), before)
    assert not np.allclose(evaluate({**variables, **moved}, x), before)


def test_actnorm_whitens_its_first_batch_and_then_stays():
    x = 5 + 3 * normal(0, 8, 4, 4, 2)
    net = ActNorm()
    variables = net.init(init_key(0), 0 * x)  # nothing of the data is in it
    np.testing.assert_array_equal(net.apply(variables, x), x)  # not yet initialised: the identity
    step = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"]))
    y, moved = step(variables, x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-5)
    variables = {**variables, **moved}
    jax.tree.map(np.testing.assert_array_equal, step(variables, 10 * x)[1], moved)
    np.testing.assert_allclose(net.apply(variables, x), y, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_global_under_pmap(norm):
    """8 devices with 1 image each = 1 device with 8 images: logits, statistics and gradient."""
    x = normal(0, 8, 6, 6, 3) * jnp.arange(1.0, 9.0)[:, None, None, None]
    net = PatchGAN(channels=4, num_layers=1, norm=norm)
    variables = random_variables(net, x)

    def step(net, x):
        def loss(params):
            logits, moved = net.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.square(logits - 1).mean(), (logits, moved)

        return jax.grad(loss, has_aux=True)(variables["params"])

    expected = jax.jit(lambda x: step(net, x))(x)

    def on_device(x):
        grads, aux = step(net.clone(axis_name="batch"), x)
        return jax.lax.pmean(grads, "batch"), aux

    grads, (logits, moved) = jax.pmap(on_device, "batch")(x[:, None])
    first = jax.tree.map(lambda leaf: leaf[0], (grads, moved))

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)

    jax.tree.map(close, (first[0], (logits[:, 0], first[1])), expected)
    jax.tree.map(lambda leaf: close(leaf, leaf[:1].repeat(8, 0)), moved)
