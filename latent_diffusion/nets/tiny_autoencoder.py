"""A tiny autoencoder for previews: TAESD's architecture (github.com/madebyollin/taesd).

It maps pictures to the *scaled* latents of another first stage and back, by convolutions and ReLUs
without norms, at a small part of the cost. Layers are numbered as in TAESD's files.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Keys
from latent_diffusion.nets.convolution import upsample_nearest
from latent_diffusion.nets.layers import Conv


class TinyBlock(nn.Module):
    """Three convolutions with ReLUs between them, a residual, and a ReLU."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = x
        for i in range(3):
            h = Conv(self.features, dtype=self.dtype, name=f"conv_{2 * i}")(
                h if i == 0 else nn.relu(h)
            )
        return nn.relu(x + h)


class TinyEncoder(nn.Module):
    """Pixels in [-1, 1] to latents. num_blocks: blocks of each level, from full resolution down."""

    out_channels: int
    features: int
    num_blocks: Sequence[int]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        h, layer = (x + 1) / 2, 0
        for level, count in enumerate(self.num_blocks):
            name = f"layers_{layer}"
            if level == 0:
                h = Conv(self.features, dtype=self.dtype, name=name)(h)
            else:
                padding = ((1, 1), (1, 1))
                h = Conv(self.features, 3, 2, padding, use_bias=False, dtype=self.dtype, name=name)(
                    h
                )
            for i in range(count):
                h = TinyBlock(self.features, self.dtype, name=f"layers_{layer + 1 + i}")(h)
            layer += 1 + count
        return Conv(self.out_channels, dtype=self.dtype, name=f"layers_{layer}")(h)


class TinyDecoder(nn.Module):
    """Latents to pixels, nominally in [-1, 1]. num_blocks: blocks of each level, full size last."""

    out_channels: int
    features: int
    num_blocks: Sequence[int]
    dtype: Any = None

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        h = 3 * jnp.tanh(z / 3)
        h = nn.relu(Conv(self.features, dtype=self.dtype, name="layers_0")(h))
        layer, levels = 2, len(self.num_blocks)  # the ReLU has a number, too
        for level, count in enumerate(self.num_blocks):
            for i in range(count):
                h = TinyBlock(self.features, self.dtype, name=f"layers_{layer + i}")(h)
            layer += count
            if level < levels - 1:
                h, layer = upsample_nearest(h), layer + 1
                h = Conv(self.features, use_bias=False, dtype=self.dtype, name=f"layers_{layer}")(h)
                layer += 1
        h = Conv(self.out_channels, dtype=self.dtype, name=f"layers_{layer}")(h)
        return 2 * h.astype(jnp.float32) - 1


class TinyAutoencoder(nn.Module):
    """Encoder and decoder; the latent has no noise and no codebook.

    channels: width of all layers. encoder_blocks, decoder_blocks: blocks of the levels in the order
    in which they run.
    """

    channels: int = 64
    encoder_blocks: Sequence[int] = (1, 3, 3, 3)
    decoder_blocks: Sequence[int] = (3, 3, 3, 1)
    embed_dim: int = 4
    image_channels: int = 3
    dtype: Any = None
    regularization: str = "tiny"  # a name, as the field of other autoencoders

    @property
    def downsampling(self) -> int:
        """f: pixels per latent position along each side."""
        return 2 ** (len(self.encoder_blocks) - 1)

    @property
    def latent_channels(self) -> int:
        """c: channels of the latent."""
        return self.embed_dim

    @property
    def last_layer(self) -> str:
        """The decoder's last convolution."""
        blocks = self.decoder_blocks
        return f"layers_{2 * len(blocks) + sum(blocks)}"

    def setup(self) -> None:
        self.encoder = TinyEncoder(self.embed_dim, self.channels, self.encoder_blocks, self.dtype)
        self.decoder = TinyDecoder(
            self.image_channels, self.channels, self.decoder_blocks, self.dtype
        )

    def encode(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w c"]:
        """Latents. Raises ValueError if height or width is not a multiple of f."""
        f = self.downsampling
        if x.shape[1] % f or x.shape[2] % f:
            raise ValueError(
                f"autoencoder: image of {x.shape[1]}×{x.shape[2]} must be divisible by f={f}"
            )
        return self.encoder(x).astype(jnp.float32)

    def latents(
        self, moments: Float[Array, "B h w c"], keys: Keys | None = None
    ) -> Float[Array, "B h w c"]:
        """The latents themselves; there is nothing to sample."""
        return moments

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Pixels from latents."""
        return self.decode_codes(z)

    def decode_codes(
        self, z: Float[Array, "B h w c"], train: bool = False
    ) -> Float[Array, "B H W C"]:
        """Pixels from latents, under the name of the perceptual-compression task."""
        return self.decoder(z)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.decode(self.encode(x))
