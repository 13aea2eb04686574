import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.nets.convolution import conv2d, max_pool, upsample_conv2d, upsample_nearest

# side, kernel, stride, padding: ordinary ones, then images or outputs smaller than the kernel
CASES = [
    (8, 3, 1, 1),
    (8, 3, 2, ((0, 1), (0, 1))),
    (1, 3, 1, 1),
    (2, 3, 1, 1),
    (3, 5, 1, 2),
    (4, 4, 1, 1),
    (4, 3, 2, 1),
    (5, 3, 2, ((0, 1), (0, 1))),
    (8, 5, 3, ((2, 0), (1, 3))),
    (32, 11, 4, 2),
]


@pytest.mark.parametrize(("side", "k", "stride", "padding"), CASES)
def test_conv2d_is_the_convolution_of_lax(side, k, stride, padding):
    """Value and both gradients, on an image one pixel wider than high."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, side, side + 1, 3)).astype(np.float32)
    kernel = random.normal(size=(k, k, 3, 4)).astype(np.float32)
    pads = padding if isinstance(padding, tuple) else ((padding, padding),) * 2

    def reference(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=dims)

    @jax.jit
    def both(x, kernel):
        y, vjp = jax.vjp(lambda x, k: conv2d(x, k, stride, padding), x, kernel)
        y_ref, vjp_ref = jax.vjp(reference, x, kernel)
        return (y, *vjp(y_ref)), (y_ref, *vjp_ref(y_ref))

    for ours, theirs in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(abs(theirs).max()))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_upsampling_and_convolving_in_one_is_both(side):
    """Value and both gradients, on an image one pixel wider than high."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, side, side + 1, 3)).astype(np.float32)
    kernel = random.normal(size=(3, 3, 3, 4)).astype(np.float32)

    @jax.jit
    def both(x, kernel):
        y, vjp = jax.vjp(upsample_conv2d, x, kernel)
        y_ref, vjp_ref = jax.vjp(lambda x, k: conv2d(upsample_nearest(x), k, 1, 1), x, kernel)
        return (y, *vjp(y_ref)), (y_ref, *vjp_ref(y_ref))

    for ours, theirs in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(abs(theirs).max()))


def test_upsampling_and_convolving_takes_four_ninths_of_the_work_on_a_cpu_alone():
    arrays = jnp.zeros((1, 8, 8, 16)), jnp.zeros((3, 3, 16, 16))
    traced = jax.jit(upsample_conv2d).trace(*arrays)
    shapes = {
        platform: re.findall(r"stablehlo.convolution.*: \((.*)\) ->", lowered.as_text())
        for platform in ("cpu", "cuda", "tpu")
        for lowered in [traced.lower(lowering_platforms=(platform,))]
    }
    at_once = ["tensor<1x16x16x16xf32>, tensor<3x3x16x16xf32>"]
    quarters = ["tensor<1x8x8x16xf32>, tensor<2x2x16x16xf32>"] * 4
    assert shapes == {"cpu": quarters, "cuda": at_once, "tpu": at_once}


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_max_pool_and_its_gradient_are_those_of_flax_in_ties_too(window, stride):
    levels = np.random.default_rng(0).integers(0, 3, (2, 9, 10, 4))
    x = jnp.asarray(levels, jnp.float32)

    def flax(x):
        return nn.max_pool(x, (window, window), (stride, stride))

    (y, vjp), (y_ref, vjp_ref) = jax.vjp(lambda x: max_pool(x, window, stride), x), jax.vjp(flax, x)
    np.testing.assert_array_equal(y, y_ref)
    rows = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)
    np.testing.assert_array_equal(vjp(rows)[0], vjp_ref(rows)[0])
