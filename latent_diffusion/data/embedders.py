"""Frozen networks that turn a picture into a vector, for variations and for retrieval.

Any network with an output [B D] can be used, such as CLIP's image encoder; a model's config names
its network. Embeddings have the length √D, so that their components are of order 1, as the
projections of a U-Net expect.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from latent_diffusion.core.types import Array, Float, Params, lookup
from latent_diffusion.nets.losses.perceptual import NETS, SCALE, SHIFT, load_lpips_params


@dataclass(frozen=True)
class Embedder:
    """A network with its weights. apply(params, images [B H W 3] in [-1, 1]) -> [B width]."""

    width: int
    params: Params
    apply: Callable[[Params, Array], Array]


def make_alexnet(path: str | Path | None) -> Embedder:
    """The outputs of the five layers of LPIPS's AlexNet, averaged over the picture and scaled.

    Early layers represent colour and texture, late layers objects. An installed package has the
    weights (see `load_lpips_params`), so that nothing is downloaded. path: other weights.
    """

    def apply(params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        x = jax.image.resize(images, (len(images), SIZE, SIZE, 3), "cubic")
        x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
        layers: Any = NETS["alex"]().apply({"params": params}, x)
        means = [jnp.mean(layer, (1, 2)) for layer in layers]
        return jnp.concatenate([_scaled(mean) for mean in means], -1)

    return Embedder(64 + 192 + 384 + 256 + 256, load_lpips_params("alex", path)["net"], apply)


EMBEDDERS: dict[str, Callable[[str | Path | None], Embedder]] = {"alexnet": make_alexnet}
SIZE = 96  # side of AlexNet's input pictures, in pixels


def make_embedder(name: str, path: str | Path | None = None) -> Embedder:
    """Return the network `name` of EMBEDDERS. path: its weights; None takes a package's."""
    return lookup(EMBEDDERS, name, "data.embedding")(path)


def embed(
    embedder: Embedder, pictures: Iterable[UInt8[np.ndarray, "H W 3"]], batch_size: int = 64
) -> Float[np.ndarray, "N D"]:
    """Embed many pictures of the same size; they are read one batch at a time."""
    apply, pictures, batches = jax.jit(embedder.apply), iter(pictures), []
    while part := list(itertools.islice(pictures, batch_size)):
        filled = np.stack(part + part[-1:] * (batch_size - len(part)))
        images = filled.astype(np.float32) / 127.5 - 1
        batches.append(np.asarray(apply(embedder.params, images))[: len(part)])
    return np.concatenate(batches)


def _scaled(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scale every row to length √D."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-12)
