"""Frozen nets that stand a vector for a picture: conditions of variation and retrieval.

Any net that gives [B D] will do, CLIP's image encoder among them; what a model was trained with is
named in its config. Embeddings have the length √D, so that their numbers are of the size that a
U-Net's projections expect.
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

from latent_diffusion.nets.losses.perceptual import NETS, SCALE, SHIFT, load_lpips_params
from latent_diffusion.types import Array, Float, Params, lookup


@dataclass(frozen=True)
class Embedder:
    """A net with its weights. apply(params, images [B H W 3] in [-1, 1]) -> [B width]."""

    width: int
    params: Params
    apply: Callable[[Params, Array], Array]


def make_alexnet(path: str | Path | None) -> Embedder:
    """The five layers of LPIPS's AlexNet, each averaged over the picture and scaled to one size.

    Early layers hold colour and texture, late ones what is shown. The weights come with a package
    (see `load_lpips_params`), so that the task needs no download.
    """

    def apply(params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        x = jax.image.resize(images, (len(images), SIZE, SIZE, 3), "cubic")
        x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
        layers: Any = NETS["alex"]().apply({"params": params}, x)
        means = [jnp.mean(layer, (1, 2)) for layer in layers]
        return jnp.concatenate([_scaled(mean) for mean in means], -1)

    return Embedder(64 + 192 + 384 + 256 + 256, load_lpips_params("alex", path)["net"], apply)


EMBEDDERS: dict[str, Callable[[str | Path | None], Embedder]] = {"alexnet": make_alexnet}
SIZE = 96  # pixels to which AlexNet's pictures are brought


def make_embedder(name: str, path: str | Path | None = None) -> Embedder:
    """The net `name` of EMBEDDERS. path: its weights; None = an installed package's."""
    return lookup(EMBEDDERS, name, "data.embedding")(path)


def embed(
    embedder: Embedder, pictures: Iterable[UInt8[np.ndarray, "H W 3"]], batch_size: int = 64
) -> Float[np.ndarray, "N D"]:
    """Embeddings of many pictures of one size, which are asked for a batch at a time."""
    apply, pictures, found = jax.jit(embedder.apply), iter(pictures), []
    while part := list(itertools.islice(pictures, batch_size)):
        filled = np.stack(part + part[-1:] * (batch_size - len(part)))
        images = filled.astype(np.float32) / 127.5 - 1
        found.append(np.asarray(apply(embedder.params, images))[: len(part)])
    return np.concatenate(found)


def _scaled(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Every row at length √D."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-12)
