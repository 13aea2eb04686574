"""A small picture, beside the latent of the large one: super-resolution."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.conditioners.noising import level_and_noise
from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Keys


class LowRes(nn.Module):
    """`low_res` [B h w 3] → concat, as it is; it has the size of the latent (App. E.2.2).

    num_levels: rows of the table of noise levels; 0 = no noise. With them the picture is noised to
    a level drawn below max_noise_level (or to the batch's `noise_level`), and the level becomes a
    vector of `width` numbers, so that a sampler can say how far to trust the picture (Ho et al.
    2021; the ×4 upscaler of Stable Diffusion v2, whose schedule is the default).
    keep: the picture stays where conditions are dropped: guidance is then by the others alone.
    Null: zeros.
    """

    num_levels: int = 0
    max_noise_level: int = 350
    width: int = 1024
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    keep: bool = False

    keys = ("low_res",)
    usual_level = 20  # where a sampling call says none

    @property
    def optional(self) -> tuple[str, ...]:
        """Keys that are drawn where the batch doesn't have them."""
        return ("noise_level",) if self.num_levels else ()

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Noise the picture to its level."""
        low_res = batch["low_res"]
        if low_res.shape[1:3] != size:
            raise ValueError(
                f"low_res has {low_res.shape[1]}×{low_res.shape[2]} pixels, but the latent is "
                f"{size[0]}×{size[1]}: they must be equal"
            )
        if not self.num_levels:
            return batch
        schedule = make_schedule("linear", self.num_levels, self.beta_start, self.beta_end)
        end, shape = self.max_noise_level, low_res.shape[1:]
        level, noise = level_and_noise("low_res", batch, rng, end, shape)
        return {**batch, "low_res": q_sample(schedule, low_res, level, noise), "noise_level": level}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        drop = drop & (not self.keep)
        low_res = zeros_where(drop, batch["low_res"])
        if not self.num_levels:
            return Conditioning(concat=low_res)
        init = nn.initializers.normal(1.0)
        table = nn.Embed(self.num_levels, self.width, embedding_init=init, name="noise_level")
        level = jnp.clip(batch["noise_level"], 0, self.num_levels - 1)
        return Conditioning(concat=low_res, vector=zeros_where(drop, table(level)))
