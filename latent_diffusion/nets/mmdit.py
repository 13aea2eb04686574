"""The denoiser of Stable Diffusion 3: MMDiT, a transformer over pictures and texts together.

Esser et al. 2024. Submodules carry the names of the released checkpoints.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Conditioning, Float, Num
from latent_diffusion.nets.blocks import through
from latent_diffusion.nets.dit import (
    FREQUENCIES,
    Modulation,
    embedded,
    embedded_patches,
    final_layer,
    modulated,
    positions_2d,
    xavier,
)
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import Dense, timestep_embedding
from latent_diffusion.nets.remat import rematerialised

Heads = Float[Array, "B L N K"]  # of N heads, K wide


class JointBlock(nn.Module):
    """Pictures ("x") and texts ("context") have separate maps, and attend to each other.

    qk_norm: root-mean-square norms of each head's queries and keys. dual: a second attention of
    the picture only to itself. last: the block doesn't update the context, which isn't needed
    after it.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dual: bool = False
    last: bool = False
    attention: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "B L D"], Float[Array, "B S D"]],
        emb: Float[Array, "B E"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B S D"]]:
        x, context = streams
        width, length = x.shape[-1], x.shape[1]
        of_x, of_context = (
            Modulation(width, count, self.dtype, name=f"{stream}_adaLN_modulation")(emb)
            for stream, count in (
                ("x_block", 9 if self.dual else 6),
                ("context_block", 2 if self.last else 6),
            )
        )
        pairs = zip(
            self._heads("x_block_attn", modulated(x, of_x[0], of_x[1])),
            self._heads("context_block_attn", modulated(context, of_context[0], of_context[1])),
            strict=True,
        )
        q, k, v = (jnp.concatenate(pair, 1) for pair in pairs)
        h = attend(q, k, v, self.attention).reshape(x.shape[0], -1, width)

        change = of_x[2][:, None] * xavier("x_block_attn_proj", width, self.dtype)(h[:, :length])
        if self.dual:
            q, k, v = self._heads("x_block_attn2", modulated(x, of_x[6], of_x[7]))
            alone = attend(q, k, v, self.attention).reshape(x.shape)
            change += of_x[8][:, None] * xavier("x_block_attn2_proj", width, self.dtype)(alone)
        x = self._feed_forward("x_block", x + change, of_x[3:6])
        if self.last:
            return x, context
        proj = xavier("context_block_attn_proj", width, self.dtype)
        context = context + of_context[2][:, None] * proj(h[:, length:])
        return x, self._feed_forward("context_block", context, of_context[3:])

    def _heads(self, name: str, h: Float[Array, "B L D"]) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values."""
        qkv = xavier(f"{name}_qkv", 3 * h.shape[-1], self.dtype)(h)
        q, k, v = jnp.unstack(qkv.reshape(*h.shape[:2], 3, self.num_heads, -1), axis=2)
        if self.qk_norm:
            q, k = (
                nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=f"{name}_ln_{end}")(part)
                for end, part in (("q", q), ("k", k))
            )
        return q.astype(v.dtype), k.astype(v.dtype), v

    def _feed_forward(
        self, stream: str, h: Float[Array, "B L D"], modulation: list[Array]
    ) -> Float[Array, "B L D"]:
        shift, scale, gate = modulation
        inner = xavier(f"{stream}_mlp_fc1", int(self.mlp_ratio * h.shape[-1]), self.dtype)
        change = nn.gelu(inner(modulated(h, shift, scale)), approximate=True)
        return h + gate[:, None] * xavier(f"{stream}_mlp_fc2", h.shape[-1], self.dtype)(change)


class MMDiT(nn.Module):
    """Predicts the flow's velocity (or eps, x0, v) from a noisy latent, its t and a `Conditioning`.

    `conditioning.context` [B S C] is required: its tokens run beside those of the latent. An
    embedding of `vector` [B V] is added to that of t; `concat` is concatenated with the latent. The
    network sees t + 1, which is 1,000 sigma for a rectified flow of 1,000 timesteps.

    out_channels: channels of the prediction. qk_norm: see `JointBlock`. dual_attention: indices of
    the blocks with `dual`. max_positions: side of the table of positions, in patches; a picture
    takes its positions from the middle. base_size: side of training latents, by which a fresh table
    is scaled. The table isn't trained. remat: as in the U-Net. scan: blocks that are alike run as a
    loop, see `blocks.through`.
    """

    out_channels: int = 16
    patch_size: int = 2
    width: int = 1536
    depth: int = 24
    num_heads: int = 24
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dual_attention: Sequence[int] = ()
    max_positions: int = 192
    base_size: int = 128
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = None
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w k"]:
        conditioning = Conditioning() if conditioning is None else conditioning
        context, side = conditioning.context, self.patch_size
        self._check(z_t.shape)
        if context is None:
            raise ValueError("mmdit: it attends to a context, and no conditioner gives one")
        size, normal = z_t.shape[1:3], nn.initializers.normal(0.02)

        h = embedded_patches(z_t, conditioning.concat, side, self.width, self.dtype)
        h = h + self._positions(size[0] // side, size[1] // side).astype(h.dtype)
        project = Dense(self.width, kernel_init=normal, dtype=self.dtype, name="context_embedder")
        context = project(context)
        emb = embedded("t_embedder", timestep_embedding(t + 1, FREQUENCIES), self.width, self.dtype)
        if conditioning.vector is not None:
            emb = emb + embedded("y_embedder", conditioning.vector, self.width, self.dtype)

        joint = rematerialised(self, JointBlock)
        kinds = [(i in self.dual_attention, i == self.depth - 1) for i in range(self.depth)]
        for kind, group in itertools.groupby(range(self.depth), kinds.__getitem__):
            sizes = (self.num_heads, self.mlp_ratio, self.qk_norm)
            block = functools.partial(joint, *sizes, *kind, self.attention, self.dtype)
            names = [f"joint_blocks_{i}" for i in group]
            h, context = through(self, block, names, (h, context), emb, scan=self.scan)

        out = final_layer(h, emb, self.out_channels, side, size, self.dtype)
        return out.astype(jnp.float32)

    def _positions(self, rows: int, columns: int) -> Float[Array, "L D"]:
        """The positions of rows×columns patches: the middle of the table."""
        side, trained = self.max_positions, self.base_size // self.patch_size

        def fresh(key: jax.Array) -> Float[Array, "1 P D"]:
            axis_positions = positions_2d(1, side, self.width, trained)[:, : self.width // 2]
            shape = (side, side, self.width // 2)
            axes = [jnp.broadcast_to(x, shape) for x in (axis_positions, axis_positions[:, None])]
            return jnp.concatenate(axes, -1).reshape(1, side * side, self.width)

        table = jax.lax.stop_gradient(self.param("pos_embed", fresh))
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = table.reshape(side, side, -1)[top : top + rows, left : left + columns]
        return grid.reshape(rows * columns, -1)

    def _check(self, shape: Sequence[int]) -> None:
        patch, largest = self.patch_size, self.max_positions * self.patch_size
        if shape[1] % patch or shape[2] % patch:
            raise ValueError(
                f"mmdit: latent of {shape[1]}×{shape[2]} must be divisible by patch_size={patch}"
            )
        if max(shape[1:3]) > largest:
            raise ValueError(
                f"mmdit: latent of {shape[1]}×{shape[2]}; max_positions={self.max_positions} "
                f"patches of {patch} allow {largest} at most"
            )
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"mmdit: width={self.width} must be divisible by 4 and by "
                f"num_heads={self.num_heads}"
            )
