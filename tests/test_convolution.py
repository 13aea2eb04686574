import jax
import numpy as np
import pytest

from latent_diffusion.convolution import conv2d

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
