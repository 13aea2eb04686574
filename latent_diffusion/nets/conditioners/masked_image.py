"""A picture with holes, beside the latent of the whole one: inpainting."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Float, Keys


class MaskedImage(nn.Module):
    """`image` and `mask` [B H W 1] (1 = hole) → concat: latents of what is left, and the mask.

    The defaults are the paper's model's: holes are −1 in pixels, the mask −1 and 1, behind the
    latents. Stable Diffusion has mask_first=True, known_mask=0.0 and hole=0.0 (grey), and keeps
    both in its unconditional pass (keep=True). Null: zeros.
    """

    hole: float = -1.0  # pixels there
    known_mask: float = -1.0  # the mask's value outside the holes; inside it is 1
    mask_first: bool = False
    keep: bool = False

    keys = ("image", "mask")

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Encode the picture without its holes; the conditioner itself knows no first stage."""
        mask = batch["mask"] > 0.5
        if mask.shape[1:3] != batch["image"].shape[1:3]:
            raise ValueError(
                f"mask is {mask.shape[1]}×{mask.shape[2]}, but the image is "
                f"{batch['image'].shape[1]}×{batch['image'].shape[2]}"
            )
        masked = jnp.where(mask, self.hole, batch["image"])
        return {**batch, "masked_latents": first_stage.encode({"image": masked})}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        latents = batch["masked_latents"]
        mask = pick_nearest((batch["mask"] > 0.5).astype(latents.dtype), latents.shape[1:3])
        mask = mask + (1 - mask) * self.known_mask
        parts = [mask, latents] if self.mask_first else [latents, mask]
        return Conditioning(concat=zeros_where(drop & (not self.keep), jnp.concatenate(parts, -1)))


def pick_nearest(x: Float[Array, "B H W C"], size: tuple[int, ...]) -> Float[Array, "B h w C"]:
    """Resize by taking pixel ⌊i·H/h⌋ for i, as the released models saw their masks."""
    rows, columns = (
        jnp.arange(new) * old // new for old, new in zip(x.shape[1:3], size, strict=True)
    )
    return x[:, rows][:, :, columns]
