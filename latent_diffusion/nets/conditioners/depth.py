"""How far things are, beside the latent."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.nets.resize import cubic
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Keys


class Depth(nn.Module):
    """`depth` [B H W 1], in any unit and of any size → concat [B h w 1] in [-1, 1].

    As in Stable Diffusion v2's depth-to-image: bicubic to the latent's size, then every map from
    its own minimum to its own maximum. keep: it stays where conditions are dropped. Null: zeros.
    """

    keep: bool = False

    keys = ("depth",)

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Resize the map to the latent."""
        depth = batch["depth"]
        rows, columns = (
            jnp.asarray(cubic(*sizes)) for sizes in zip(depth.shape[1:3], size, strict=True)
        )
        return {**batch, "depth": jnp.einsum("ih,bhwc,jw->bijc", rows, depth, columns)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        depth = batch["depth"]
        low = jnp.min(depth, (1, 2, 3), keepdims=True)
        high = jnp.max(depth, (1, 2, 3), keepdims=True)
        depth = 2 * (depth - low) / (high - low + 1e-3) - 1
        return Conditioning(concat=zeros_where(drop & (not self.keep), depth))
