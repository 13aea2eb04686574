"""The package `lpips` with installed weights, so that nothing is downloaded."""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def _conv_relu(*args: int, **kwargs: int) -> list[nn.Module]:
    return [nn.Conv2d(*args, **kwargs), nn.ReLU()]


def _vgg16_features() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for block, (width, convs) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        layers += [nn.MaxPool2d(2, 2)] if block else []
        for _ in range(convs):
            layers += _conv_relu(channels, width, 3, padding=1)
            channels = width
    return layers


def _alexnet_features() -> list[nn.Module]:
    return [
        *_conv_relu(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *_conv_relu(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *_conv_relu(192, 384, 3, padding=1),
        *_conv_relu(384, 256, 3, padding=1),
        *_conv_relu(256, 256, 3, padding=1),
    ]


def _with_weights(layers: list[nn.Module], params: Any) -> types.SimpleNamespace:
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for conv, (_, p) in zip(convs, sorted(params["net"].items()), strict=True):
        conv.weight.data = torch.from_numpy(p["kernel"].transpose(3, 2, 0, 1).copy())
        conv.bias.data = torch.from_numpy(p["bias"].copy())
    return types.SimpleNamespace(features=nn.Sequential(*layers))


@contextlib.contextmanager
def _torchvision(params: Any) -> Iterator[None]:
    """Replace torchvision by a module with the two classifiers that `lpips` imports."""
    module: Any = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(
        vgg16=lambda pretrained: _with_weights(_vgg16_features(), params),
        alexnet=lambda pretrained: _with_weights(_alexnet_features(), params),
    )
    theirs = {name: sys.modules.pop(name, None) for name in ("torchvision", "lpips")}
    before = set(sys.modules)
    sys.modules["torchvision"] = module
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in theirs:
                del sys.modules[name]
        sys.modules.update({k: m for k, m in theirs.items() if m is not None})


def make_lpips(net: str, params: Any) -> nn.Module:
    """`lpips.LPIPS(net)` with the classifier of `load_lpips_params(net)` and the package's maps."""
    with _torchvision(params):
        return importlib.import_module("lpips").LPIPS(net=net, verbose=False)
