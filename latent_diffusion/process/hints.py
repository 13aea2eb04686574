"""Hints for control nets that are computed from pictures."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float

THRESHOLD = 0.1  # least change of brightness per pixel for an edge; from black to white is 1


def edges(image: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """White lines on black where the brightness of a picture in [-1, 1] changes (Sobel 1968)."""
    grey = (image + 1) / 2 @ jnp.array([0.299, 0.587, 0.114])
    wide = jnp.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = wide[:, :, 2:] - wide[:, :, :-2]
    down = wide[:, 2:] - wide[:, :-2]
    x = (across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) / 8
    y = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 8
    lines = (jnp.hypot(x, y) > THRESHOLD).astype(jnp.float32)
    return jnp.repeat(lines[..., None], 3, -1)


HINTS: dict[str, Callable[[Array], Array]] = {"edges": edges}
