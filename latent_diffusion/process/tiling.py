"""Encode and decode images too large for memory: overlapping tiles, blended where they meet.

All tiles have the same size and go through the network one after the other, in a compiled loop, so
the network's activations take the memory of one tile. Group norms and attention see a tile instead
of the whole, so the result isn't equal to the result without tiles, but similar.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float

Map = Callable[[Array], Array]


def tiled(
    function: Map, x: Float[Array, "B H W C"], tile: int, overlap: int
) -> Float[Array, "B H2 W2 C2"]:
    """`function` applied to overlapping tiles of x, their outputs blended.

    function: maps [B tile tile C] to [B s s C2] with the same ratio s / tile everywhere, such as a
    first stage's `moments` or `decode`. tile, overlap: pixels of x along each side; neighbouring
    tiles share at least `overlap`, across which they fade into each other. A side smaller than
    `tile` takes one tile of the side's size. Raises ValueError unless overlap is in [0, tile), and
    for sizes that are scaled to fractions of a pixel.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tile overlap {overlap} must lie in [0, tile size {tile})")
    batch, height, width, _ = x.shape
    sides = min(tile, height), min(tile, width)
    shape = jax.eval_shape(function, jax.ShapeDtypeStruct((batch, *sides, x.shape[3]), x.dtype))
    rows, columns = (
        _starts(n, side, overlap) for n, side in zip((height, width), sides, strict=True)
    )
    scale = shape.shape[1] / sides[0]
    corners = np.array([(row, column) for row in rows for column in columns])
    outputs = corners * scale
    if (outputs % 1).any() or shape.shape[2] != sides[1] * scale:
        raise ValueError(
            f"tile size {tile} and overlap {overlap} must be multiples of {round(1 / scale)}"
        )
    ramps = [_ramps(side, round(overlap * scale)) for side in shape.shape[1:3]]
    window = jnp.asarray(np.outer(*ramps), jnp.float32)[None, :, :, None]
    total = jnp.zeros((batch, round(height * scale), round(width * scale), shape.shape[3]))
    weight = jnp.zeros((1, *total.shape[1:3], 1))

    def add(carry: tuple[Array, Array], corner: tuple[Array, Array]) -> tuple:
        (total, weight), ((row, column), (out_row, out_column)) = carry, corner
        part = jax.lax.dynamic_slice(x, (0, row, column, 0), (batch, *sides, x.shape[3]))
        place = (0, out_row, out_column, 0)
        total = _add_at(total, window * function(part), place)
        return (total, _add_at(weight, window, place)), None

    (total, weight), _ = jax.lax.scan(
        add, (total, weight), (jnp.asarray(corners), jnp.asarray(outputs.astype(int)))
    )
    return total / weight


def tile_of_latent(size: int | None, overlap: int | None, f: int) -> tuple[int, int] | None:
    """A tile's side and overlap in the latent, from side and overlap in pixels.

    None as overlap is a quarter of a tile, cut to whole positions. Raises ValueError for an overlap
    without a size, and for pixels that f doesn't divide.
    """
    if size is None and overlap is not None:
        raise ValueError(f"tile_overlap={overlap} needs tile_size: give both")
    if size is None:
        return None
    overlap = size // 4 // f * f if overlap is None else overlap
    if size % f or overlap % f:
        raise ValueError(f"tile size {size} and overlap {overlap} must be multiples of f={f}")
    return size // f, overlap // f


def pad_to_multiple(x: Float[Array, "B H W C"], multiple: int) -> Float[Array, "B H2 W2 C"]:
    """Repeat the last row and column until both sides are multiples of `multiple`."""
    below, right = (-x.shape[1] % multiple, -x.shape[2] % multiple)
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge")


def _starts(length: int, side: int, overlap: int) -> np.ndarray:
    """Where tiles begin: every `side − overlap`; the last tile is moved back to end at the edge."""
    if length == side:
        return np.zeros(1, int)
    return np.minimum(np.arange(0, length - overlap, side - overlap), length - side)


def _ramps(length: int, overlap: int) -> np.ndarray:
    """Weights along a side: they rise over the overlap, are 1, then fall; never 0, for borders."""
    rise = np.minimum(np.arange(1, length + 1) / (overlap + 1), 1.0)
    return np.minimum(rise, rise[::-1])


def _add_at(whole: Array, part: Array, corner: tuple) -> Array:
    there = jax.lax.dynamic_slice(whole, corner, part.shape)
    return jax.lax.dynamic_update_slice(whole, there + part, corner)
