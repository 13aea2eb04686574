"""Objects in boxes as a small picture, drawn beside the latent."""

import math

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.conditioners.layout import sentences
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Float, Int


class LayoutMap(nn.Module):
    """`layout` [B L] (see `data.layout`) → concat [B height width channels]: what lies where.

    Every class owns a learned vector, which fills its box; where boxes overlap, vectors add up.
    Beside `layout`'s transformer it makes a hybrid of concatenation and cross-attention, as
    `word_map` does beside that of text: attention alone needs long to find out which place of the
    picture a token means. Sentences have three tokens an object, and two for the crop or none.
    height, width: of the latent. Null: no objects, which is 0.
    """

    vocab_size: int = 8192
    max_length: int = 92
    height: int = 8
    width: int = 8
    channels: int = 8

    keys = ("layout",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = sentences("layout_map", batch, self.max_length)
        count = tokens.shape[1] // 3
        labels, first, last = jnp.moveaxis(tokens[:, : 3 * count].reshape(-1, count, 3), 2, 0)
        corners = [self._point(first), self._point(last)]
        if tokens.shape[1] % 3 == 2:  # boxes are the whole picture's, and a part of it is seen
            start, end = self._point(tokens[:, -2:-1]), self._point(tokens[:, -1:])
            seen = jnp.maximum(end - start, 1e-3)
            corners = [(corner - start) / seen for corner in corners]
        (x0, y0), (x1, y1) = (jnp.moveaxis(corner, 2, 0) for corner in corners)
        told = (labels != self.vocab_size - 1) & ~drop[:, None]
        vectors = nn.Embed(self.vocab_size, self.channels, name="embedding")(labels)
        vectors = jnp.where(told[..., None], vectors, 0)
        rows, columns = _covered(y0, y1, self.height), _covered(x0, x1, self.width)
        return Conditioning(concat=jnp.einsum("bnh,bnw,bnc->bhwc", rows, columns, vectors))

    def _point(self, token: Int[Array, "B n"]) -> Float[Array, "B n 2"]:
        """(x, y) in [0, 1] of a place."""
        side = math.isqrt(self.vocab_size)
        return jnp.stack([token % side, token // side], -1) / (side - 1)


def _covered(
    start: Float[Array, "B n"], end: Float[Array, "B n"], size: int
) -> Float[Array, "B n s"]:
    """The share of each of `size` cells along [0, 1] that lies between start and end."""
    edges = jnp.linspace(0, 1, size + 1)
    low = jnp.maximum(start[..., None], edges[:-1])
    high = jnp.minimum(end[..., None], edges[1:])
    return jnp.maximum(high - low, 0) * size
