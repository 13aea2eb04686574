"""The denoiser as a transformer over patches of the latent: DiT (Peebles & Xie 2023).

Submodules carry the names of the released checkpoints, so that conversion is a short table.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Conditioning, Float, Num
from latent_diffusion.nets.attention import CrossAttention
from latent_diffusion.nets.blocks import through
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import Dense, layer_norm, precomputed, timestep_embedding
from latent_diffusion.nets.remat import rematerialised

FREQUENCIES = 256  # width of the timestep's sinusoids


def positions_2d(height: int, width: int, features: int, base: int) -> Float[Array, "L D"]:
    """Fixed positions of a grid of patches, row by row: [sin x, cos x, sin y, cos y] (MAE's).

    base: the side of the training grid, in patches; a grid of another size spans the same range, so
    that its positions lie between those of training. features: D, a multiple of 4.
    """
    omega = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    y, x = np.meshgrid(
        np.arange(height) * (base / height), np.arange(width) * (base / width), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    waves = [wave for angle in angles for wave in (np.sin(angle), np.cos(angle))]
    return jnp.asarray(np.concatenate(waves, 1), jnp.float32)


def modulated(
    x: Float[Array, "B L D"],
    shift: Float[Array, "#B D"],
    scale: Float[Array, "#B D"],
    epsilon: float = 1e-6,
) -> Float[Array, "B L D"]:
    """Layer normalisation in float32, whose scale and shift come from the condition: adaLN."""
    h = nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False, dtype=jnp.float32)(x)
    return (h * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def to_patches(z: Float[Array, "B h w c"], side: int) -> Float[Array, "B L D"]:
    """Patches of side×side positions, row by row; within a patch, values in the same order."""
    batch, height, width, channels = z.shape
    rows, columns = height // side, width // side
    patches = z.reshape(batch, rows, side, columns, side, channels).swapaxes(2, 3)
    return patches.reshape(batch, rows * columns, side * side * channels)


def from_patches(
    patches: Float[Array, "B L D"], side: int, size: Sequence[int]
) -> Float[Array, "B h w c"]:
    """The inverse of `to_patches`. size: (h, w)."""
    rows, columns = size[0] // side, size[1] // side
    z = patches.reshape(-1, rows, columns, side, side, patches.shape[-1] // side**2)
    return z.swapaxes(2, 3).reshape(-1, *size, z.shape[-1])


def xavier(name: str, features: int, dtype: Any) -> Dense:
    """A linear map with the initial weights of DiT's blocks."""
    return Dense(features, kernel_init=nn.initializers.xavier_uniform(), dtype=dtype, name=name)


def embedded_patches(
    z_t: Float[Array, "B h w c"],
    concat: Float[Array, "B h w d"] | None,
    side: int,
    width: int,
    dtype: Any,
) -> Float[Array, "B L D"]:
    """Embed the patches of the latent, with `concat` as further channels, in a compact module."""
    z_t = z_t if concat is None else jnp.concatenate([z_t, concat], -1)
    return xavier("x_embedder_proj", width, dtype)(to_patches(z_t, side))


def final_layer(
    h: Float[Array, "B L D"],
    emb: Float[Array, "B E"],
    channels: int,
    side: int,
    size: Sequence[int],
    dtype: Any,
) -> Float[Array, "B h w k"]:
    """The prediction, in a compact module; it is zero before training. size: (h, w)."""
    shift, scale = Modulation(h.shape[-1], 2, dtype, name="final_layer_adaLN_modulation")(emb)
    out = Dense(side * side * channels, zero_init=True, dtype=dtype, name="final_layer_linear")
    return from_patches(out(modulated(h, shift, scale)), side, size)


def embedded(name: str, x: Float[Array, "B D"], width: int, dtype: Any) -> Float[Array, "B E"]:
    """Pass x through two linear maps to `width`, in a compact module. name: prefix of the maps."""
    normal = nn.initializers.normal(0.02)
    h = Dense(width, kernel_init=normal, dtype=dtype, name=f"{name}_mlp_0")(x)
    return Dense(width, kernel_init=normal, dtype=dtype, name=f"{name}_mlp_2")(nn.silu(h))


class Modulation(nn.Module):
    """`count` vectors of width `features` for a block, from the embedding of t and vector."""

    features: int
    count: int
    dtype: Any = None

    @nn.compact
    def __call__(self, emb: Float[Array, "B E"]) -> list[Array]:
        # Zero weights make every block the identity before training (adaLN-Zero).
        dense = Dense(self.count * self.features, zero_init=True, dtype=self.dtype, name="1")
        out = precomputed(self, "of_timestep", lambda: dense(nn.silu(emb)))
        return jnp.split(out, self.count, axis=-1)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, each modulated by and gated with the embedding.

    A context adds a cross-attention between the two, as in PixArt-α (Chen et al. 2024).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    mlp_norm_eps: float = 1e-6
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        emb: Float[Array, "B E"],
        context: Float[Array, "B S C"] | None,
    ) -> Float[Array, "B L D"]:
        features = x.shape[-1]
        modulation = Modulation(features, 6, self.dtype, name="adaLN_modulation")(emb)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation

        h = xavier("attn_qkv", 3 * features, self.dtype)(modulated(x, shift, scale))
        q, k, v = jnp.unstack(h.reshape(*x.shape[:2], 3, self.num_heads, -1), axis=2)
        h = attend(q, k, v, self.attention).reshape(x.shape)
        x = x + gate[:, None] * xavier("attn_proj", features, self.dtype)(h)

        if context is not None:
            cross = CrossAttention(
                self.num_heads,
                features // self.num_heads,
                self.attention,
                self.dtype,
                zero_init=True,
                name="cross_attn",
            )
            x = x + cross(layer_norm("norm_cross", 1e-6)(x).astype(x.dtype), context)

        h = modulated(x, mlp_shift, mlp_scale, self.mlp_norm_eps)
        inner = xavier("mlp_fc1", int(self.mlp_ratio * features), self.dtype)
        h = nn.gelu(inner(h), approximate=True)
        return x + mlp_gate[:, None] * xavier("mlp_fc2", features, self.dtype)(h)


class DiT(nn.Module):
    """Predicts eps, x0, v or the flow's velocity from a noisy latent, its t and a `Conditioning`.

    A transformer over patches. `conditioning.vector` [B width] is added to the embedding of t,
    every block attends to `context`, and `concat` is concatenated with the latent.

    out_channels: channels of the prediction. base_size: side of training latents, for positions.
    mlp_norm_eps: epsilon of the norm before the feed-forward (1e-5 in some diffusers folders).
    frequency_shift: `shift` of `timestep_embedding`; 0 in the code of DiT, 1 in diffusers.
    sit: the convention of SiT (Ma et al. 2024): the network sees the share of data 1 − (t + 1)/1000
    instead of t, and its velocity points to the data, so that its negative is the "flow" here.
    learned_variance: the network also predicts as many channels of an interpolation between the
    bounds of the variance (Nichol & Dhariwal 2021); only `with_variance` returns them.
    remat: as in the U-Net. scan: the blocks run as a loop, see `blocks.through`.
    """

    out_channels: int = 4
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    mlp_norm_eps: float = 1e-6
    frequency_shift: int = 0
    base_size: int = 32
    learned_variance: bool = False
    sit: bool = False
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = None
    scan: bool = False

    def with_variance(self) -> "DiT":
        """The same network with twice the channels, of which the second half is the variance."""
        return self.clone(out_channels=2 * self.out_channels, learned_variance=False)

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w k"]:
        conditioning = Conditioning() if conditioning is None else conditioning
        self._check(z_t.shape)
        side, size = self.patch_size, z_t.shape[1:3]
        rows, columns = size[0] // side, size[1] // side

        h = embedded_patches(z_t, conditioning.concat, side, self.width, self.dtype)
        positions = positions_2d(rows, columns, self.width, self.base_size // side)
        h = h + positions.astype(h.dtype)
        time = 1 - (t + 1) / 1000 if self.sit else t
        emb = self._embedding(time, conditioning.vector)

        block = functools.partial(
            rematerialised(self, DiTBlock),
            self.num_heads,
            self.mlp_ratio,
            self.mlp_norm_eps,
            self.attention,
            self.dtype,
        )
        names = [f"blocks_{i}" for i in range(self.depth)]
        h = through(self, block, names, h, emb, conditioning.context, scan=self.scan)

        channels = self.out_channels * (2 if self.learned_variance else 1)
        out = final_layer(h, emb, channels, side, size, self.dtype)[..., : self.out_channels]
        return -out.astype(jnp.float32) if self.sit else out.astype(jnp.float32)

    def _embedding(
        self, t: Num[Array, " B"], vector: Float[Array, "B D"] | None
    ) -> Float[Array, "B E"]:
        emb = timestep_embedding(t, FREQUENCIES, shift=self.frequency_shift)
        emb = embedded("t_embedder", emb, self.width, self.dtype)
        if vector is None:
            return emb
        if vector.shape[-1] != self.width:
            raise ValueError(
                f"dit: conditioning.vector has width {vector.shape[-1]}; the conditioner's width "
                f"must be the transformer's, {self.width}"
            )
        return emb + vector

    def _check(self, shape: Sequence[int]) -> None:
        if shape[1] % self.patch_size or shape[2] % self.patch_size:
            raise ValueError(
                f"dit: latent of {shape[1]}×{shape[2]} must be divisible by "
                f"patch_size={self.patch_size}"
            )
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"dit: width={self.width} must be divisible by 4 and by num_heads={self.num_heads}"
            )
