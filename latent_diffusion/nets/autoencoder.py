"""The first stage: encoder, regulariser, decoder (Rombach et al. 2022, section 3.1 and App. G).

Submodules carry the names of the released checkpoints. Level 0 has the full resolution.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Int, Keys
from latent_diffusion.nets.attention import attention_2d
from latent_diffusion.nets.layers import Conv, GroupNorm, UpsampleConv
from latent_diffusion.nets.posterior import DiagonalGaussian
from latent_diffusion.nets.quantizer import GumbelQuantizer, Quantized, VectorQuantizer
from latent_diffusion.nets.remat import rematerialised

REGULARIZATIONS = ("kl", "vq", "gumbel", "none")
WITH_CODEBOOK = ("vq", "gumbel")


class ResnetBlock(nn.Module):
    """Two pre-activated 3×3 convolutions and a residual, 1×1-projected on channel change."""

    features: int
    dropout: float = 0.0
    num_groups: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W F"]:
        h = nn.silu(GroupNorm(self.num_groups, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(GroupNorm(self.num_groups, name="norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="nin_shortcut")(x)
        return x + h


class Architecture(nn.Module):
    """The fields that encoder, decoder and autoencoder share.

    attn_resolutions: sizes of feature maps at which blocks carry attention, for images of size
    `resolution`; images of another size have attention at the same levels.
    remat: recompute every block's activations in the backward pass (less memory, more time).
    """

    channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = ()
    attn_type: str = "vanilla"
    resolution: int = 256
    dropout: float = 0.0
    num_groups: int = 32
    remat: bool = False
    attention: str = "auto"
    dtype: Any = None


class Backbone(Architecture):
    """The parts that encoder and decoder share."""

    def block(self, name: str, features: int) -> ResnetBlock:
        """A residual block."""
        block = rematerialised(self, ResnetBlock, static_argnums=(2,))
        return block(features, self.dropout, self.num_groups, self.dtype, name=name)

    def attend(self, name: str):
        """An attention block, or the identity."""
        return attention_2d(self.attn_type, self.num_groups, self.attention, self.dtype, name)

    def attends_at(self, level: int) -> bool:
        """Whether blocks of this level are followed by attention."""
        return self.resolution // 2**level in self.attn_resolutions

    def middle(self, h: Array, train: bool) -> Array:
        """Residual block, attention, residual block at the lowest resolution."""
        h = self.block("mid_block_1", h.shape[-1])(h, train)
        h = self.attend("mid_attn_1")(h)
        return self.block("mid_block_2", h.shape[-1])(h, train)

    def head(self, h: Array, features: int) -> Array:
        """Norm, swish and the last convolution."""
        h = nn.silu(GroupNorm(self.num_groups, name="norm_out")(h))
        return Conv(features, dtype=self.dtype, name="conv_out")(h)


class Encoder(Backbone):
    """Pixels [B H W C] to features [B H/f W/f out_channels], f = 2^(levels − 1)."""

    out_channels: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w k"]:
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(x)
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                h = self.block(f"down_{level}_block_{i}", mult * self.channels)(h, train)
                if self.attends_at(level):
                    h = self.attend(f"down_{level}_attn_{i}")(h)
            if level != len(self.channel_mult) - 1:
                # The reference pads right and bottom only.
                h = Conv(
                    h.shape[-1],
                    stride=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"down_{level}_downsample_conv",
                )(h)
        return self.head(self.middle(h, train), self.out_channels)


class Decoder(Backbone):
    """Features [B h w z] to pixels [B h·f w·f out_channels].

    tanh_out: squash the output into (−1, 1).
    """

    out_channels: int = 3
    tanh_out: bool = False

    @nn.compact
    def __call__(self, z: Float[Array, "B h w z"], train: bool = False) -> Float[Array, "B H W C"]:
        levels = len(self.channel_mult)
        h = Conv(self.channel_mult[-1] * self.channels, dtype=self.dtype, name="conv_in")(z)
        h = self.middle(h, train)
        for level in reversed(range(levels)):
            for i in range(self.num_res_blocks + 1):
                width = self.channel_mult[level] * self.channels
                h = self.block(f"up_{level}_block_{i}", width)(h, train)
                if self.attends_at(level):
                    h = self.attend(f"up_{level}_attn_{i}")(h)
            if level:
                name = f"up_{level}_upsample_conv"
                h = UpsampleConv(h.shape[-1], dtype=self.dtype, name=name)(h)
        x = self.head(h, self.out_channels).astype(jnp.float32)
        return jnp.tanh(x) if self.tanh_out else x


@flax.struct.dataclass
class Reconstruction:
    """The result of a training forward pass through the autoencoder.

    x: [B H W C] the reconstruction. regularization: [] mean KL per image in nats (kl), codebook
    loss (vq, gumbel) or 0. metrics: numbers to log; `latent_mean` and `latent_mean_square` are per
    channel [c]: their averages over devices are exact, unlike those of standard deviations.
    """

    x: Any
    regularization: Any
    metrics: dict[str, Any]


class Autoencoder(Architecture):
    """Perceptual compression: x → moments → z → x.

    regularization: "kl" (diagonal Gaussian posterior), "vq" or "gumbel" (a codebook; as the first
    stage of a diffusion model the latents stay continuous and `decode` quantises them) or "none".
    z_channels: width of the encoder's output; embed_dim: channels c of the latent.
    codebook_*, gumbel_*: see `VectorQuantizer` and `GumbelQuantizer`.
    """

    image_channels: int = 3
    z_channels: int = 4
    embed_dim: int = 4
    tanh_out: bool = False
    regularization: str = "kl"
    last_layer = "conv_out"  # the decoder's, for the adversarial loss's adaptive weight
    num_codes: int = 8192
    codebook_beta: float = 0.25
    codebook_legacy: bool = True
    codebook_l2: bool = False
    codebook_ema_decay: float = 0.0
    codebook_restart_below: float = 0.0
    gumbel_kl_weight: float = 5e-4
    gumbel_straight_through: bool = True
    axis_name: str | None = None

    @property
    def downsampling(self) -> int:
        """f: pixels per latent position along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def latent_channels(self) -> int:
        """c: channels of the latent."""
        return self.embed_dim

    def setup(self) -> None:
        if self.regularization not in REGULARIZATIONS:
            raise ValueError(
                f"autoencoder.regularization={self.regularization!r}; "
                f"known: {', '.join(REGULARIZATIONS)}"
            )
        shared = set(Architecture.__dataclass_fields__) - {"parent", "name"}
        fields = {name: getattr(self, name) for name in shared}
        num_moments = 2 if self.regularization == "kl" else 1
        self.encoder = Encoder(out_channels=num_moments * self.z_channels, **fields)
        self.decoder = Decoder(out_channels=self.image_channels, tanh_out=self.tanh_out, **fields)
        self.quant_conv = Conv(num_moments * self.embed_dim, 1, dtype=self.dtype)
        self.post_quant_conv = Conv(self.z_channels, 1, dtype=self.dtype)
        if self._has_codes:
            self.quantize = self._make_quantizer()

    def _make_quantizer(self) -> Any:
        if self.regularization == "gumbel":
            return GumbelQuantizer(
                self.num_codes,
                self.embed_dim,
                self.gumbel_kl_weight,
                self.gumbel_straight_through,
                self.axis_name,
            )
        return VectorQuantizer(
            self.num_codes,
            self.embed_dim,
            self.codebook_beta,
            self.codebook_legacy,
            self.codebook_l2,
            self.codebook_ema_decay,
            self.codebook_restart_below,
            self.axis_name,
        )

    def encode(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w m"]:
        """Moments of the latent: mean and log-variance (m = 2c) for kl, the latent (m = c) else.

        Raises ValueError if height or width is not a multiple of f.
        """
        if x.shape[-1] != self.image_channels:
            raise ValueError(
                f"autoencoder: image has {x.shape[-1]} channels, expected {self.image_channels}"
            )
        f = self.downsampling
        if x.shape[1] % f or x.shape[2] % f:
            raise ValueError(
                f"autoencoder: image of {x.shape[1]}×{x.shape[2]} must be divisible by f={f}"
            )
        return self.quant_conv(self.encoder(x, train)).astype(jnp.float32)

    def latents(
        self, moments: Float[Array, "B h w m"], keys: Keys | None = None
    ) -> Float[Array, "B h w c"]:
        """Latents from their moments: samples with one key per example, or modes without `keys`."""
        if self.regularization != "kl":
            return moments
        posterior = DiagonalGaussian.from_moments(moments)
        return posterior.mode() if keys is None else posterior.sample(keys)

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Pixels from latents, which a model with a codebook quantises first."""
        return self.decode_codes(self.quantize(z).codes if self._has_codes else z)

    def decode_codes(
        self, z: Float[Array, "B h w c"], train: bool = False
    ) -> Float[Array, "B H W C"]:
        """Pixels from latents, which are not quantised first."""
        return self.decoder(self.post_quant_conv(z), train)

    def encode_to_indices(self, x: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
        """Codebook indices of an image's latents. ValueError without a codebook."""
        self._need_codes()
        return self.quantize(self.encode(x)).indices

    def decode_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Pixels from codebook indices. ValueError without a codebook."""
        self._need_codes()
        return self.decode_codes(self.quantize.lookup(indices))

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        keys: Keys | None = None,
        train: bool = False,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> Reconstruction:
        """Encode, regularise, decode.

        keys: one per example, for random latents; None takes the most likely latents. temperature:
        the Gumbel softmax's. With `train`, moving averages of codes go to the collection
        `codebook`.
        """
        z, regularization, metrics = self.regularize(
            self.encode(x, train), keys, train, temperature
        )
        return Reconstruction(self.decode_codes(z, train), regularization, metrics)

    def regularize(
        self,
        moments: Float[Array, "B h w m"],
        keys: Keys | None = None,
        train: bool = False,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "B h w c"], Float[Array, ""], dict[str, Any]]:
        """From moments to (latents, regularization, metrics); see `Reconstruction`."""
        if self._has_codes:
            quantized = self._quantize(moments, keys, train, temperature)
            metrics = {"perplexity": quantized.perplexity, "codebook_usage": quantized.usage}
            return quantized.codes, quantized.loss, {**latent_statistics(moments), **metrics}
        z = self.latents(moments, keys)
        if self.regularization == "none":
            return z, jnp.zeros(()), latent_statistics(z)
        posterior = DiagonalGaussian.from_moments(moments)
        metrics = {
            **latent_statistics(z),
            "posterior_mean": jnp.mean(posterior.mean),
            "posterior_mean_abs": jnp.mean(jnp.abs(posterior.mean)),
            "posterior_std": jnp.mean(posterior.std),
        }
        return z, jnp.mean(posterior.kl()), metrics

    @property
    def _has_codes(self) -> bool:
        return self.regularization in WITH_CODEBOOK

    def _need_codes(self) -> None:
        if not self._has_codes:
            raise ValueError(
                f"an autoencoder with regularization={self.regularization!r} has no codebook; "
                "'vq' and 'gumbel' have one"
            )

    def _quantize(
        self,
        moments: Float[Array, "B h w c"],
        keys: Keys | None,
        train: bool,
        temperature: float | Float[Array, ""],
    ) -> Quantized:
        if self.regularization == "gumbel":
            return self.quantize(moments, keys, temperature)
        # Restarts draw from the global batch, so all devices have the same key.
        restarts = train and self.codebook_restart_below and not self.is_initializing()
        return self.quantize(moments, train, self.make_rng("codebook") if restarts else None)


def latent_statistics(z: Float[Array, "B h w c"]) -> dict[str, Any]:
    """Mean and mean square [c] of the latents' channels, by the names of `Reconstruction`."""
    return {
        "latent_mean": jnp.mean(z, (0, 1, 2)),
        "latent_mean_square": jnp.mean(jnp.square(z), (0, 1, 2)),
    }


class Identity(nn.Module):
    """No compression: the denoiser works on pixels (LDM-1 of the paper)."""

    image_channels: int = 3

    downsampling = 1

    @property
    def latent_channels(self) -> int:
        """The channels of the image."""
        return self.image_channels

    def encode(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The image itself."""
        return x

    def latents(
        self, moments: Float[Array, "B H W C"], keys: Keys | None = None
    ) -> Float[Array, "B H W C"]:
        """The image itself; there is nothing to sample."""
        return moments

    def decode(self, z: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The image itself."""
        return z

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x
