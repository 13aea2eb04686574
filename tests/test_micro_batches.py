"""A step in parts: the numbers of a whole step, and on a CPU no loop around convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.optimisation.micro_batches import in_parts, value_and_grad_in_parts

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 4)), jnp.float32)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6, 6, 2)), jnp.float32)


def convolve(kernel, images):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jnp.tanh(
        jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", None, None, dimensions)
    )


def loss(kernel, images):
    per_example = jnp.mean(jnp.square(convolve(kernel, images)), axis=(1, 2, 3))
    return jnp.mean(per_example), per_example


def total(count):
    def function(kernel, images):
        return jnp.sum(jnp.square(in_parts(convolve, count)(kernel, images)))

    return jax.value_and_grad(function)


STEPS = {"value_and_grad": lambda count: value_and_grad_in_parts(loss, count), "in_parts": total}


@pytest.mark.parametrize("name", STEPS)
def test_parts_give_the_numbers_of_the_whole(name):
    got, want = (jax.jit(STEPS[name](count))(KERNEL, IMAGES) for count in (4, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("name", STEPS)
def test_the_loop_over_parts_is_written_out_on_cpus_alone(name):
    """In a loop XLA's CPU computes gradients of convolutions 30 times slower."""
    traced = jax.jit(STEPS[name](4)).trace(KERNEL, IMAGES)
    programs = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "stablehlo.while" not in programs["cpu"]
    assert "stablehlo.while" in programs["tpu"]
