"""Pictures concatenated to the latent: low resolutions, pictures with holes, depth maps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import normal_per_example, split_per_example
from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float, Keys
from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.nets.resize import bicubic
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.process.schedules import make_schedule


class LowRes(nn.Module):
    """`low_res` [B h w 3] → concat: super-resolution (Rombach et al. 2022, App. E.2.2).

    The picture has the latent's size and is concatenated unchanged; the null condition is zeros.

    num_levels: the number of noise levels; 0 means no noise. With levels, the picture is noised to
    the batch's `noise_level`, or to a random level below `end_of_levels`. An embedding of the level
    [B width] becomes the vector: it tells the denoiser how far to trust the picture (Ho et al.
    2021). The default schedule is from Stable Diffusion v2's ×4 upscaler.
    keep: the picture stays where conditions are dropped, so guidance depends only on the others.
    """

    num_levels: int = 0
    max_noise_level: int = 350
    width: int = 1024
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    keep: bool = False

    keys = ("low_res",)

    @property
    def end_of_levels(self) -> int:
        """The bound below which all levels lie, random ones and those that a call gives."""
        return min(self.max_noise_level, self.num_levels)

    @property
    def usual_level(self) -> int:
        """The default of a sampling call."""
        return min(20, self.end_of_levels - 1)

    @property
    def optional(self) -> tuple[str, ...]:
        """Keys whose values are drawn at random if the batch lacks them."""
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
        end, shape = self.end_of_levels, low_res.shape[1:]
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


def level_and_noise(
    name: str, batch: Batch, rng: Keys | None, end: int, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """The level [B] and the noise [B *shape] of a condition; a random level in [0, end) by default.

    Without `rng` (a key for each example) raises ValueError, which names the conditioner.
    """
    if rng is None:
        raise ValueError(f"{name}: noise needs a key for each example")
    k_level, k_noise = split_per_example(rng, 2)
    level = batch.get("noise_level")
    if level is None:
        level = jax.vmap(lambda key: jax.random.randint(key, (), 0, end))(k_level)
    return level, normal_per_example(k_noise, shape)


class MaskedImage(nn.Module):
    """`image` and `mask` [B H W 1] (1 = hole) → concat: the masked image's latents and the mask.

    The defaults are from the paper's inpainting model: pixels in holes are −1; the mask is 1 in
    holes and −1 elsewhere, and comes after the latents. Stable Diffusion has mask_first=True,
    known_mask=0.0, hole=0.0 (grey) and keep=True: image and mask stay where conditions are dropped.
    The null condition is zeros.
    """

    hole: float = -1.0  # the pixels in holes
    known_mask: float = -1.0  # the mask's value outside the holes; inside it is 1
    mask_first: bool = False
    keep: bool = False

    keys = ("image", "mask")

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Encode the picture with its holes filled by `hole`; `__call__` has no first stage."""
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
    """Resize: output pixel i is input pixel ⌊i·H/h⌋, as for the masks of released models."""
    old = x.shape[1:3]
    rows, columns = (jnp.arange(n) * o // n for n, o in zip(size, old, strict=True))
    return x[:, rows][:, :, columns]


class Depth(nn.Module):
    """`depth` [B H W 1], in any unit and of any size → concat [B h w 1] in [-1, 1].

    As in Stable Diffusion v2's depth-to-image, maps are resized to the latent (bicubic), and each
    is scaled from its minimum and maximum to [-1, 1]. keep: the map stays where conditions are
    dropped. The null condition is zeros.
    """

    keep: bool = False

    keys = ("depth",)

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None
    ) -> Batch:
        """Resize the map to the latent."""
        return {**batch, "depth": bicubic(batch["depth"], size[0], size[1])}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        depth = batch["depth"]
        low = jnp.min(depth, (1, 2, 3), keepdims=True)
        high = jnp.max(depth, (1, 2, 3), keepdims=True)
        depth = 2 * (depth - low) / (high - low + 1e-3) - 1
        return Conditioning(concat=zeros_where(drop & (not self.keep), depth))
