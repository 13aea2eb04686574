"""The denoiser: a time- and condition-aware U-Net (Rombach et al. 2022; Dhariwal & Nichol 2021).

Submodules carry the names of the released checkpoints (input_blocks, middle_block, output_blocks),
so that conversion is a short table.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Conditioning, Float, Num
from latent_diffusion.nets.attention import AttentionBlock, SpatialTransformer
from latent_diffusion.nets.convolution import average_pool, upsample_nearest
from latent_diffusion.nets.layers import (
    Conv,
    Dense,
    GroupNorm,
    UpsampleConv,
    guidance_embedding,
    precomputed,
    timestep_embedding,
)
from latent_diffusion.nets.pooling import Pooling
from latent_diffusion.nets.remat import rematerialised


class ResBlock(nn.Module):
    """Two convolutions around the timestep embedding; optionally resampling by a factor of two.

    resample: "none", "up" (nearest) or "down" (2×2 mean), applied to both branches.
    scale_shift: the embedding modulates the second norm, h·(1 + scale) + shift, instead of adding.
    """

    features: int
    dropout: float = 0.0
    scale_shift: bool = False
    resample: str = "none"
    num_groups: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], train: bool = False
    ) -> Float[Array, "B h w F"]:
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-5, name="in_layers_0")(x))
        conv = Conv
        if self.resample == "down":
            h, x = average_pool(h), average_pool(x)
        elif self.resample == "up":
            conv, x = UpsampleConv, upsample_nearest(x)
        h = conv(self.features, dtype=self.dtype, name="in_layers_2")(h)
        width = (2 if self.scale_shift else 1) * self.features
        project = Dense(width, dtype=self.dtype, name="emb_layers_1")
        emb = precomputed(self, "of_timestep", lambda: project(nn.silu(emb)))[:, None, None, :]
        norm = GroupNorm(self.num_groups, epsilon=1e-5, name="out_layers_0")
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not train)
        h = Conv(self.features, zero_init=True, dtype=self.dtype, name="out_layers_3")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="skip_connection")(x)
        return x + h


def _added(h: Array, more: Array | None) -> Array:
    """The features h plus an adapter's, if any, in the dtype of the network."""
    return h if more is None else h + more.astype(h.dtype)


class UNet(nn.Module):
    """Predicts eps, x0 or v from a noisy latent, its timestep and a `Conditioning`.

    out_channels: channels of the prediction. model_channels: width at full resolution.
    attention_resolutions: downsampling *factors* (1, 2, 4 …) at which blocks carry attention.
    num_heads, num_head_channels: number or width of heads; the width counts if both are set.
    transformer_depth: 0 means plain self-attention (no context), else blocks per transformer; a
    number, or a number for each level (Stable Diffusion XL).
    middle_depth: the same for the middle; None takes the last level's depth.
    disable_self_attentions: per level, replace self-attention by a second cross-attention.
    vector_projection: pass `conditioning.vector` through a two-layer map to the embedding width.
    guidance_dim: width of the sinusoid of `conditioning.guidance`, which a linear map adds to the
    timestep's: guidance is distilled into the network (Luo et al. 2023), which isn't run twice.
    num_codes: predict logits over codebook entries instead of a latent.
    pool: a kind of `Pooling`: only the way down, and `out_channels` class scores [B k] at its end.
    Adapters' additions (`conditioning.residuals`, `.features`) have an entry for each skip, in the
    order of the blocks, and an entry for the middle.
    remat: a name of `nets.remat.REMAT`: the activations that the backward pass recomputes.
    scan: deep transformers run as loops over their blocks, whose forward pass compiles faster and
    reads copies of the blocks' parameters.
    """

    out_channels: int = 4
    model_channels: int = 320
    channel_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (4, 2, 1)
    num_heads: int = 8
    num_head_channels: int | None = None
    transformer_depth: int | Sequence[int] = 1
    disable_self_attentions: Sequence[bool] = ()
    legacy_qkv_order: bool = True
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    vector_projection: bool = False
    guidance_dim: int | None = None
    num_codes: int | None = None
    pool: str = ""
    dropout: float = 0.0
    num_groups: int = 32
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = None
    middle_depth: int | None = None
    scan: bool = False

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per transformer, on each level and in the middle."""
        each, levels = self.transformer_depth, len(self.channel_mult)
        depths = (each,) * levels if isinstance(each, int) else tuple(each)
        middle = depths[-1:] if self.middle_depth is None else (self.middle_depth,)
        attending = [2**level in self.attention_resolutions for level in range(levels)]
        used = [d for d, yes in zip(depths, attending, strict=False) if yes] + [*middle]
        if len(depths) != levels or (any(depths) and not all(used)):
            raise ValueError(
                f"unet.transformer_depth={each} and middle_depth={self.middle_depth}: expected one "
                f"number, or {levels} that are at least 1 where a level has attention"
            )
        return depths + middle

    def _res_block(self, name: str, features: int, resample: str = "none"):
        block = rematerialised(self, ResBlock, static_argnums=(3,))
        return block(
            features,
            self.dropout,
            self.use_scale_shift_norm,
            resample,
            self.num_groups,
            self.dtype,
            name=name,
        )

    def _attention(self, name: str, channels: int, level: int):
        """Attention of width `channels` as a function of (h, conditioning).

        level: index of the resolution; the number of levels stands for the middle.
        """
        if self.num_head_channels:
            num_heads, head_dim = channels // self.num_head_channels, self.num_head_channels
        else:
            num_heads, head_dim = self.num_heads, channels // self.num_heads
        if num_heads * head_dim != channels:
            raise ValueError(
                f"unet: {channels} channels cannot be split into heads "
                f"(num_heads={self.num_heads}, num_head_channels={self.num_head_channels})"
            )
        if self.depths[level] == 0:
            block = rematerialised(self, AttentionBlock)(
                num_heads,
                self.legacy_qkv_order,
                self.num_groups,
                self.attention,
                self.dtype,
                name=name,
            )
            return lambda h, conditioning: block(h)
        transformer = rematerialised(self, SpatialTransformer)
        last = len(self.channel_mult) - 1
        crossed = self.disable_self_attentions
        disabled = bool(crossed) and crossed[min(level, last)]
        attend = transformer(
            num_heads,
            head_dim,
            self.depths[level],
            not disabled,
            self.num_groups,
            self.attention,
            self.dtype,
            self.scan,
            name=name,
        )
        return lambda h, c: attend(h, c.context, (c.image_context or {}).get(name))

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w k"] | Float[Array, "B k"]:
        conditioning = Conditioning() if conditioning is None else conditioning
        skips, h, emb = self._way_down(z_t, t, conditioning, train)
        if self.pool:
            means = [jnp.mean(x, (1, 2)) for x in [*skips, h]]
            sizes = (self.num_head_channels or Pooling.head_dim, self.num_groups)
            pooling = Pooling(
                self.pool, self.out_channels, *sizes, self.attention, self.dtype, name="out"
            )
            return pooling(h, means)

        if conditioning.residuals:
            *skip_residuals, last = conditioning.residuals
            skips = [_added(skip, x) for skip, x in zip(skips, skip_residuals, strict=True)]
            h = _added(h, last)

        # The way up has one more block per level; each block takes a skip.
        index = -1
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            channels = mult * self.model_channels
            for block in range(self.num_res_blocks + 1):
                index += 1
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._res_block(f"output_blocks_{index}_0", channels)(h, emb, train)
                part = 1
                if 2**level in self.attention_resolutions:
                    attention = self._attention(f"output_blocks_{index}_1", channels, level)
                    h, part = attention(h, conditioning), 2
                if level and block == self.num_res_blocks:
                    size = skips[-1].shape[1:3]
                    h = self._upsample(f"output_blocks_{index}_{part}", h, emb, train, size)

        if self.num_codes is not None:
            h = GroupNorm(self.num_groups, epsilon=1e-5, name="id_predictor_0")(h)
            return Conv(self.num_codes, 1, dtype=self.dtype, name="id_predictor_1")(h)
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-5, name="out_0")(h))
        h = Conv(self.out_channels, zero_init=True, dtype=self.dtype, name="out_2")(h)
        return h.astype(jnp.float32)

    def _way_down(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning,
        train: bool,
        hint: Float[Array, "B h w F"] | None = None,
    ) -> tuple[list[Array], Array, Float[Array, "B E"]]:
        """Every block's output (the skips of the way up), the middle's output and the embedding.

        hint: added to the output of the first convolution (see `nets.control`).
        """
        levels = len(self.channel_mult)
        factor = 2 ** (levels - 1)
        if self.resblock_updown and (z_t.shape[1] % factor or z_t.shape[2] % factor):
            raise ValueError(
                f"unet: latent of {z_t.shape[1]}×{z_t.shape[2]} must be divisible by {factor}"
            )
        emb = self._embedding(t, conditioning.vector, conditioning.guidance)
        concat = conditioning.concat
        if concat is not None and concat.shape[1:3] != z_t.shape[1:3]:
            raise ValueError(
                f"unet: conditioning.concat is {concat.shape[1]}×{concat.shape[2]}, "
                f"the latent {z_t.shape[1]}×{z_t.shape[2]}"
            )
        h = z_t if concat is None else jnp.concatenate([z_t, concat], -1)

        h = Conv(self.model_channels, dtype=self.dtype, name="input_blocks_0_0")(h)
        skips, index = [h if hint is None else h + hint], 0
        h, features = skips[0], dict(enumerate(conditioning.features))
        for level, mult in enumerate(self.channel_mult):
            channels = mult * self.model_channels
            for _ in range(self.num_res_blocks):
                index += 1
                h = self._res_block(f"input_blocks_{index}_0", channels)(h, emb, train)
                if 2**level in self.attention_resolutions:
                    attention = self._attention(f"input_blocks_{index}_1", channels, level)
                    h = attention(h, conditioning)
                h = _added(h, features.get(index))
                skips.append(h)
            if level != levels - 1:
                index += 1
                h = self._downsample(f"input_blocks_{index}_0", h, emb, train)
                h = _added(h, features.get(index))
                skips.append(h)

        h = self._res_block("middle_block_0", channels)(h, emb, train)
        h = self._attention("middle_block_1", channels, levels)(h, conditioning)
        h = self._res_block("middle_block_2", channels)(h, emb, train)
        return skips, _added(h, features.get(index + 1)), emb

    def _embedding(
        self,
        t: Num[Array, " B"],
        vector: Float[Array, "B D"] | None,
        guidance: Float[Array, " B"] | None,
    ) -> Float[Array, "B E"]:
        width = 4 * self.model_channels
        emb = timestep_embedding(t, self.model_channels)
        has_guidance = guidance is not None or self.is_initializing()
        if self.guidance_dim is not None and has_guidance:
            w = jnp.zeros(t.shape) if guidance is None else guidance
            project = Dense(
                self.model_channels,
                use_bias=False,
                zero_init=True,
                dtype=self.dtype,
                name="time_embed_guidance",
            )
            emb = emb + project(guidance_embedding(w, self.guidance_dim))
        emb = Dense(width, dtype=self.dtype, name="time_embed_0")(emb)
        emb = Dense(width, dtype=self.dtype, name="time_embed_2")(nn.silu(emb))
        if vector is None:
            return emb
        if self.vector_projection:
            vector = Dense(width, dtype=self.dtype, name="label_emb_0")(vector)
            vector = Dense(width, dtype=self.dtype, name="label_emb_2")(nn.silu(vector))
        if vector.shape[-1] != width:
            raise ValueError(
                f"unet: conditioning.vector has width {vector.shape[-1]}, the timestep embedding "
                f"{width}; set the conditioner's width to it or vector_projection=True"
            )
        return emb + vector

    def _downsample(self, name: str, h: Array, emb: Array, train: bool) -> Array:
        if self.resblock_updown:
            return self._res_block(name, h.shape[-1], "down")(h, emb, train)
        return Conv(h.shape[-1], 3, 2, ((1, 1), (1, 1)), dtype=self.dtype, name=f"{name}_op")(h)

    def _upsample(
        self, name: str, h: Array, emb: Array, train: bool, size: tuple[int, ...]
    ) -> Array:
        """h at the `size` of the next skip: twice h's size, or one less where the skip's is odd."""
        if self.resblock_updown:
            return self._res_block(name, h.shape[-1], "up")(h, emb, train)
        name = f"{name}_conv"
        if (2 * h.shape[1], 2 * h.shape[2]) == size:
            return UpsampleConv(h.shape[-1], dtype=self.dtype, name=name)(h)
        h = upsample_nearest(h)[:, : size[0], : size[1]]
        return Conv(h.shape[-1], dtype=self.dtype, name=name)(h)
