"""Networks that compute features of pictures. The names of scores contain the network's name."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from latent_diffusion.convert.clip import Clip
from latent_diffusion.core.types import Array, Float, Num, Params, lookup
from latent_diffusion.evaluate import inception
from latent_diffusion.evaluate.resize import FILTERS, resize
from latent_diffusion.nets.losses.perceptual import NETS, load_lpips_params, standardize

CLASSIFIER_SIZE = 224  # pixels a side of the training images of AlexNet and VGG16


@dataclass(frozen=True)
class FeatureNet:
    """A frozen net. apply(params, levels [B H W 3] of 0 ... 255) gives arrays [B D] by name.

    The names are "features" and, for a net with class scores, "logits".
    """

    name: str
    params: Params
    apply: Callable[[Params, Array], dict[str, Array]]


def _inception(path: str | Path | None, filter: str) -> FeatureNet:
    """The net of FID, KID and the Inception score."""

    def apply(params: Params, levels: Float[Array, "B H W 3"]) -> dict[str, Array]:
        x = resize(levels, inception.SIZE, filter)
        out: Any = inception.InceptionV3().apply({"params": params}, x)
        return dict(zip(("features", "logits"), out, strict=True))

    return FeatureNet("inception", inception.load_inception_params(path), apply)


def _classifier(name: str, net: str, path: str | Path | None, filter: str) -> FeatureNet:
    """The last layer of an LPIPS backbone, averaged over positions (256 or 512 numbers).

    path: see `load_lpips_params`; None takes the installed package.
    """

    def apply(params: Params, levels: Float[Array, "B H W 3"]) -> dict[str, Array]:
        x = resize(levels, CLASSIFIER_SIZE, filter) / 127.5 - 1
        layers: Any = NETS[net]().apply({"params": params}, standardize(x))
        return {"features": jnp.mean(layers[-1], (1, 2))}

    return FeatureNet(name, load_lpips_params(net, path or None)["net"], apply)


FEATURES: dict[str, Callable[[str | Path | None, str], FeatureNet]] = {
    "inception": _inception,
    "alexnet": functools.partial(_classifier, "alexnet", "alex"),  # relu5
    "vgg16": functools.partial(_classifier, "vgg16", "vgg"),  # relu5_3
}


def make_features(name: str, path: str | Path | None = None, filter: str = "bicubic") -> FeatureNet:
    """The feature net `name` with its weights. filter: resizes pictures to the net's input size."""
    lookup(FILTERS, filter, "filter")
    return lookup(FEATURES, name, "features")(path, filter)


def with_clip(net: FeatureNet | None, clip: Clip) -> FeatureNet:
    """The arrays of `net`, if any, and CLIP's embeddings of the pictures as "clip"."""

    def apply(params: Params, levels: Float[Array, "B H W 3"]) -> dict[str, Array]:
        arrays = {} if net is None else net.apply(params["net"], levels)
        return {**arrays, "clip": clip.of_images(params["clip"], levels / 127.5 - 1)}

    name, params = ("clip", {}) if net is None else (net.name, net.params)
    return FeatureNet(name, {"net": params, "clip": clip.params}, apply)


def levels_of(images: Num[Array, "B H W C"]) -> Float[Array, "B H W 3"]:
    """Float levels from bytes, or from images in [-1, 1], which are rounded as for a PNG."""
    if images.dtype == jnp.uint8:
        levels = images.astype(jnp.float32)
    else:
        levels = jnp.clip(jnp.round(images * 127.5 + 127.5), 0, 255)
    return jnp.broadcast_to(levels, (*levels.shape[:3], 3)) if levels.shape[3] == 1 else levels
