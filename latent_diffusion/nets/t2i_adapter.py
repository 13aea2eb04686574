"""T2I-Adapters (Mou et al. 2023): small nets that add features of a hint to a U-Net's way down.

The features depend on neither the latent nor the timestep: they are computed once per call.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float
from latent_diffusion.nets.convolution import average_pool
from latent_diffusion.nets.layers import Conv

KINDS = ("full", "full_xl", "light")


class T2IAdapter(nn.Module):
    """A hint [B H W 3] in [0, 1] as features, one for each entry of `channels`.

    kind: "full" halves the size before each level but the first; "full_xl" before the third only;
    "light" is as "full", with narrow levels. downscale: pixels per position of the first features.
    in_channels: 3, or 1 for a net that sees only the brightness of the hint (edges, sketches).
    """

    kind: str = "full"
    channels: Sequence[int] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale: int = 8
    dtype: Any = None
    in_channels: int = 3

    @property
    def shrinks(self) -> tuple[int, ...]:
        """For each level, the pixels per position of its features, along each side."""
        halves = [i == 2 if self.kind == "full_xl" else i > 0 for i in range(len(self.channels))]
        return tuple(self.downscale * 2 ** sum(halves[: i + 1]) for i in range(len(halves)))

    @nn.compact
    def __call__(self, hint: Float[Array, "B H W C"]) -> list[Float[Array, "B h w F"]]:
        light = self.kind == "light"

        def conv(name: str, x: Array, width: int, size: int) -> Array:
            return Conv(width, size, dtype=self.dtype, name=name)(x)

        if self.in_channels == 1:
            hint = hint @ jnp.array([[0.299], [0.587], [0.114]], hint.dtype)
        x = _unshuffled(hint, self.downscale)
        x = x if light else conv("conv_in", x, self.channels[0], 3)
        features, before = [], self.downscale
        for i, (width, shrink) in enumerate(zip(self.channels, self.shrinks, strict=True)):
            x, before = x if shrink == before else average_pool(x), shrink
            inner = width // 4 if light else width
            if light or x.shape[-1] != width:
                x = conv(f"body_{i}_in_conv", x, inner, 1)
            for j in range(self.num_res_blocks):
                name = f"body_{i}_resnets_{j}"
                h = nn.relu(conv(f"{name}_block1", x, inner, 3))
                x = x + conv(f"{name}_block2", h, inner, 3 if light else 1)
            x = conv(f"body_{i}_out_conv", x, width, 1) if light else x
            features.append(x)
        return features


def _unshuffled(x: Float[Array, "B H W C"], side: int) -> Float[Array, "B h w D"]:
    """Move squares of pixels to channels: all pixels of the first channel, then of the next."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, -1)
