"""Conditions that are tokens in front of a prior's codes.

They share one table with the codes. `offset` is the first token of a condition: 0 in the models of
taming-transformers (Esser et al. 2021), where a class and a code share a row, else the number of
codes or more. `null` is the token of the null condition; None if a model has not learned it.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Keys
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.nets.conditioners.text import sentences
from latent_diffusion.nets.resize import bicubic


def _dropped(drop: Bool[Array, " B"], tokens: Any, null: int | None) -> Array:
    """The tokens [B ...], with `null` in the examples that are dropped."""
    if null is None:
        return jnp.asarray(tokens)
    return jnp.where(drop.reshape(-1, *[1] * (tokens.ndim - 1)), null, tokens)


class Start(nn.Module):
    """The constant first token of an unconditional prior."""

    token: int = 0

    keys = ()

    @property
    def end(self) -> int:
        """One more than the largest token."""
        return self.token + 1

    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        return Conditioning(tokens=jnp.full((drop.shape[0], 1), self.token, jnp.int32))


class ClassToken(nn.Module):
    """`class_label` [B] as one token; labels outside the classes are the null condition."""

    num_classes: int = 1000
    offset: int = 0
    null: int | None = None

    keys = ("class_label",)

    @property
    def end(self) -> int:
        """One more than the largest token."""
        return max(self.offset + self.num_classes, (self.null or 0) + 1)

    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        label = batch["class_label"]
        drop = drop | (label < 0) | (label >= self.num_classes)
        return Conditioning(tokens=_dropped(drop, self.offset + label, self.null)[:, None])


class LayoutTokens(nn.Module):
    """Objects in boxes: `layout` [B L] (see `data.layout`) as L tokens.

    has_null: whether the model has learned a null condition, the layout without objects. centres,
    encode_crop: see `Layout`.
    """

    vocab_size: int = 8192
    max_length: int = 92
    offset: int = 0
    has_null: bool = True
    centres: bool = False
    encode_crop: bool | None = None

    keys = ("layout",)

    @property
    def null(self) -> int | None:
        """The token that stands for no object."""
        return self.end - 1 if self.has_null else None

    @property
    def end(self) -> int:
        """One more than the largest token."""
        return self.offset + self.vocab_size

    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = sentences("layout_tokens", batch, self.max_length)
        return Conditioning(tokens=_dropped(drop, self.offset + tokens, self.null))


class SegmentationTokens(nn.Module):
    """`segmentation` [B H W] as a map of tokens: each square's most frequent class.

    factor: the side of a square, in pixels; it is the first stage's f.
    """

    num_classes: int = 182
    factor: int = 16
    offset: int = 0
    null: int | None = None

    keys = ("segmentation",)

    @property
    def end(self) -> int:
        """One more than the largest token."""
        return max(self.offset + self.num_classes, (self.null or 0) + 1)

    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        classes = jax.nn.one_hot(batch["segmentation"], self.num_classes)
        squares = (self.factor, self.factor)
        most = jnp.argmax(nn.avg_pool(classes, squares, squares), -1)
        tokens = _dropped(drop, self.offset + most, self.null)
        return Conditioning(token_maps=tokens[:, None].astype(jnp.int32))

    def unread_square(self, maps: np.ndarray) -> str | None:
        """In words, a square of `maps` [... H W] without any class, which would count as class 0.

        None if there is no such square.
        """
        side = self.factor
        height, width = (size // side for size in maps.shape[-2:])  # as the network reads them
        whole = maps[..., : height * side, : width * side]
        squares = whole.reshape(-1, side, width, side)
        of_no_class = ((squares < 0) | (squares >= self.num_classes)).all((1, 3))
        labels = squares[:, 0, :, 0][of_no_class]
        if not labels.size:
            return None
        return f"{side}×{side} pixels have no class, but labels as {labels[0]}"


class Coordinates(nn.Module):
    """The position of each code in the picture, in reading order, as a map of tokens.

    num_places: the tokens of the picture's pixels run from 0 to num_places, in reading order.
    factor: the side of a code's square, in pixels.
    """

    num_places: int = 1024
    factor: int = 16
    offset: int = 0

    keys = ()

    @property
    def end(self) -> int:
        """One more than the largest token."""
        return self.offset + self.num_places

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Add the positions for a latent of `size`: the mean of each code's square of pixels."""
        rows, columns = (np.arange(n * self.factor).reshape(n, -1).mean(1) for n in size[:2])
        height, width = (n * self.factor for n in size[:2])
        share = (rows[:, None] * width + columns) / (height * width)
        places = np.round(self.num_places * share).astype(np.int32)
        return {**batch, "coordinates": self.offset + places[None, None]}

    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        places = jnp.asarray(batch["coordinates"])
        return Conditioning(token_maps=jnp.broadcast_to(places, (drop.shape[0], *places.shape[1:])))


class CodeMap(nn.Module):
    """The codes of a first stage of depth or segmentation maps, as a map of tokens.

    key: "depth" (each map is resized to the picture, scaled to [-1, 1], and repeated if the first
    stage has several channels) or "segmentation" (one-hot). autoencoder: the fields of this first
    stage, which is trained before and frozen here.
    """

    key: str = "segmentation"
    autoencoder: Mapping[str, Any] = FrozenDict()
    offset: int = 0
    null: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The batch key that is read."""
        return (self.key,)

    @property
    def num_classes(self) -> int:
        """The classes of a segmentation."""
        return self.autoencoder["image_channels"]

    @property
    def end(self) -> int:
        """One more than the largest token."""
        return max(self.offset + self.autoencoder["num_codes"], (self.null or 0) + 1)

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Resize a depth map to the picture, whose codes have `size`."""
        if self.key != "depth":
            return batch
        height, width = (n * first_stage.module.downsampling for n in size[:2])
        return {**batch, "depth": bicubic(batch["depth"], height, width)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        x = batch[self.key]
        if self.key == "segmentation":
            x = jax.nn.one_hot(x, self.num_classes)
        else:
            low, high = (bound(x, (1, 2, 3), keepdims=True) for bound in (jnp.min, jnp.max))
            x = 2.0 * (x - low) / jnp.maximum(high - low, 1e-6) - 1.0
            x = jnp.broadcast_to(x, (*x.shape[:3], self.num_classes))
        first_stage = Autoencoder(**self.autoencoder, name="autoencoder")
        if self.is_initializing():
            first_stage(x)  # makes the decoder's parameters, too: files have them
        codes = first_stage.encode_to_indices(x)
        return Conditioning(token_maps=_dropped(drop, self.offset + codes, self.null)[:, None])
