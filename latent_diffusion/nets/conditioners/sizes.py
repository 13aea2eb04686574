"""Sizes of pictures as a condition: Stable Diffusion XL's micro-conditioning."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning
from latent_diffusion.nets.layers import timestep_embedding

SIZES = ("original_size", "crop_top_left", "target_size", "aesthetic_score")  # batch keys
AESTHETIC_SCORE = 6.0  # the default of a sampling call, as in diffusers
NEGATIVE_SCORE = 2.5  # the default for the unconditional prediction


class Sizes(nn.Module):
    """Numbers of a picture as a vector [B n·width] of their sinusoids (Podell et al. 2023, 2.2).

    The numbers are the `original_size` [B 2] of a picture before it was resized, `crop_top_left`
    [B 2] of the training crop and `target_size` [B 2] of the picture in training: pixels, height or
    top first. So a denoiser can learn from small and from cropped pictures without drawing such
    pictures. Where conditions are dropped the numbers stay.

    aesthetic_score: `aesthetic_score` [B] takes the place of the target size, as in the refiner.
    width: width of each number's sinusoid, which is computed as for timesteps.
    """

    aesthetic_score: bool = False
    width: int = 256

    @property
    def keys(self) -> tuple[str, ...]:
        """Batch keys in the order of their numbers."""
        last = "aesthetic_score" if self.aesthetic_score else "target_size"
        return ("original_size", "crop_top_left", last)

    @nn.nowrap
    def defaults(self, size: tuple[int, int]) -> dict[str, Any]:
        """The values of a sampling call: original and target have `size`, without a crop."""
        values: dict[str, Any] = dict.fromkeys(("original_size", "target_size"), size)
        values |= {"crop_top_left": (0, 0), "aesthetic_score": AESTHETIC_SCORE}
        return {key: values[key] for key in self.keys}

    @property
    def opposites(self) -> dict[str, Any]:
        """Values for the unconditional prediction that differ from those of the condition."""
        return {"aesthetic_score": NEGATIVE_SCORE} if self.aesthetic_score else {}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        rows = [batch[key].reshape(len(drop), -1).astype(jnp.float32) for key in self.keys]
        numbers = jnp.concatenate(rows, axis=1)
        sinusoids = timestep_embedding(numbers.reshape(-1), self.width)
        return Conditioning(vector=sinusoids.reshape(len(drop), -1))
