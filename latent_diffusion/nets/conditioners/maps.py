"""Conditions as maps of the latent's size: labels of pixels, words, objects in boxes."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float, Int, Keys
from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.nets.conditioners.text import sentences
from latent_diffusion.nets.convolution import average_pool
from latent_diffusion.nets.layers import Conv


class SpatialRescaler(nn.Module):
    """`segmentation` [B H W] → concat [B H/2ⁿ W/2ⁿ C] (Rombach et al. 2022, App. E.2.2).

    The one-hot maps of `num_classes` labels are halved n = `num_stages` times (means of 2×2
    pixels), and a 1×1 convolution maps them to C = `out_channels`; with out_channels=0 there is no
    convolution. Labels outside the classes count as no class. The null condition is zeros.
    """

    num_classes: int = 182
    num_stages: int = 2
    out_channels: int = 3
    use_bias: bool = False

    keys = ("segmentation",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        labels, factor = batch["segmentation"], 2**self.num_stages
        if labels.shape[1] % factor or labels.shape[2] % factor:
            raise ValueError(
                f"spatial_rescaler: a map of {labels.shape[1]}×{labels.shape[2]} can't be halved "
                f"num_stages={self.num_stages} times"
            )
        x = jax.nn.one_hot(labels, self.num_classes)
        for _ in range(self.num_stages):
            x = average_pool(x)
        if self.out_channels:
            x = Conv(self.out_channels, 1, use_bias=self.use_bias, name="channel_mapper")(x)
        return Conditioning(concat=zeros_where(drop, x))


class WordMap(nn.Module):
    """`tokens` [B L] → concat [B height width channels]: the sum of the words' learned maps.

    Cross-attention takes long to learn where the colours and shapes of a word belong. A linear map
    learns it in the first steps of a short training on a few thousand captions. Beside a text
    transformer it makes a hybrid of concatenation and cross-attention. height, width: the latent's
    size. Padding (token 0) has no map, so the null condition is zeros.
    """

    vocab_size: int = 2048
    height: int = 8
    width: int = 8
    channels: int = 8

    keys = ("tokens",)
    table = "embedding/embedding"  # has a row for each word

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Raise ValueError unless the latent has the maps' size."""
        _check_size("word_map", (self.height, self.width), size)
        return batch

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens, init = batch["tokens"], nn.initializers.normal(0.02)
        numbers = self.height * self.width * self.channels
        maps = nn.Embed(self.vocab_size, numbers, embedding_init=init, name="embedding")(tokens)
        is_word = (tokens != 0) & ~drop[:, None]
        total = jnp.sum(jnp.where(is_word[..., None], maps, 0), axis=1)
        return Conditioning(concat=total.reshape(-1, self.height, self.width, self.channels))


class LayoutMap(nn.Module):
    """`layout` [B L] (see `data.layout`) → concat [B height width channels]: filled boxes.

    Every class has a learned vector, which fills the boxes of its objects; where boxes overlap, the
    vectors are added. Use it beside `Layout`, as `WordMap` beside a text transformer. A layout has
    three tokens for each object, and two more for a crop. height, width: the latent's size. The
    null condition is the map without objects: zeros.
    """

    vocab_size: int = 8192
    max_length: int = 92
    height: int = 8
    width: int = 8
    channels: int = 8

    keys = ("layout",)

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Raise ValueError unless the latent has the maps' size."""
        _check_size("layout_map", (self.height, self.width), size)
        return batch

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = sentences("layout_map", batch, self.max_length)
        count = tokens.shape[1] // 3
        labels, first, last = jnp.moveaxis(tokens[:, : 3 * count].reshape(-1, count, 3), 2, 0)
        corners = [self._point(first), self._point(last)]
        if tokens.shape[1] % 3 == 2:  # move boxes in the whole picture to boxes in the crop
            start, end = self._point(tokens[:, -2:-1]), self._point(tokens[:, -1:])
            size = jnp.maximum(end - start, 1e-3)
            corners = [(corner - start) / size for corner in corners]
        (x0, y0), (x1, y1) = (jnp.moveaxis(corner, 2, 0) for corner in corners)
        is_object = (labels != self.vocab_size - 1) & ~drop[:, None]
        vectors = nn.Embed(self.vocab_size, self.channels, name="embedding")(labels)
        vectors = jnp.where(is_object[..., None], vectors, 0)
        rows, columns = _covered(y0, y1, self.height), _covered(x0, x1, self.width)
        return Conditioning(concat=jnp.einsum("bnh,bnw,bnc->bhwc", rows, columns, vectors))

    def _point(self, token: Int[Array, "B n"]) -> Float[Array, "B n 2"]:
        """The point (x, y) in [0, 1]² that a token stands for."""
        side = math.isqrt(self.vocab_size)
        return jnp.stack([token % side, token // side], -1) / (side - 1)


def _check_size(name: str, map_size: tuple[int, int], size: tuple[int, ...]) -> None:
    if map_size != tuple(size):
        raise ValueError(
            f"{name} has maps of {map_size[0]}×{map_size[1]}, but the latent is "
            f"{size[0]}×{size[1]}: a trained model only draws pictures of its size; a new model "
            f"needs conditioners.{name}.height={size[0]} and conditioners.{name}.width={size[1]}"
        )


def _covered(
    start: Float[Array, "B n"], end: Float[Array, "B n"], size: int
) -> Float[Array, "B n s"]:
    """The share of each of `size` cells along [0, 1] that lies between start and end."""
    edges = jnp.linspace(0, 1, size + 1)
    low = jnp.maximum(start[..., None], edges[:-1])
    high = jnp.minimum(end[..., None], edges[1:])
    return jnp.maximum(high - low, 0) * size
