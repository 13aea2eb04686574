"""A sampling call of a prior: its arguments, and the images of a batch."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.rng import sampling_keys
from latent_diffusion.core.types import Array
from latent_diffusion.generation import conditions, program
from latent_diffusion.models.prior import check_null, check_size
from latent_diffusion.process.guidance import paste
from latent_diffusion.process.plan import plan_prior
from latent_diffusion.runtime import parallel

# Arguments of `Model.sample` that only denoisers use.
_OTHERS = (
    *("negative_prompts", "more_prompts", "z_T", "classifier", "classifier_labels", "target"),
    *("adapters", "controls", "image_prompts", "negative_original_size", "negative_crop_top_left"),
    *("negative_target_size", "negative_aesthetic_score"),
)


def draw(
    model: Any,
    batch: dict[str, np.ndarray],
    latent: tuple[int, int, int],
    call: Mapping[str, Any],
    rng: jax.Array,
    batch_size: int,
    mode: str,
) -> np.ndarray:
    """Images [N H W C] of a `Model` with a prior. batch: the entries [N ...] of the conditions.

    latent: height and width of the codes, and the side of the window in training. call: the other
    arguments and options of `Model.sample`. Raises ValueError for arguments that don't fit.
    """
    prior, first_stage, options = model.prior, model.first_stage, dict(call)
    for name in _OTHERS:
        value = options.pop(name)
        if not (value is None or (isinstance(value, tuple) and not value)):
            raise ValueError(f"{name} is for denoisers: this model draws codes with a prior")
    for name in ("progress", "preview"):
        if options.pop(name, None) is not None:
            raise ValueError(
                f"{name} looks on between the evaluations of a denoiser: a prior draws its codes "
                "in one program"
            )
    image, mask = options.pop("image"), options.pop("mask")
    chosen = plan_prior(model.defaults, options, prior.transformer.causal)
    if chosen.guidance_scale is not None:
        check_null(prior.conditioner, f"guidance_scale={chosen.guidance_scale:g}")
    check_size(prior.transformer, latent[:2], latent[2])
    if image is not None and mask is None:
        raise ValueError("image needs mask: a prior draws the codes of the hole anew")
    f, channels = first_stage.module.downsampling, first_stage.module.image_channels
    shape = (latent[0] * f, latent[1] * f, channels)
    batch |= conditions.known_image(image, mask, False, shape, len(batch["index"]))
    mode = parallel.resolve_mode(mode)
    networks = program.placed(model, {"first_stage": first_stage, "prior": prior}, mode)
    return program.run(networks, chosen, batch, latent, rng, batch_size, mode, images_of)


def images_of(call: program.Call) -> Array:
    """Prepare the conditions, draw codes, decode them, and paste them into their picture.

    The call's latent: height and width of the codes, and the side of the window in training.
    """
    networks, options, batch, image_keys, latent = call
    prior, first_stage = networks["prior"], networks["first_stage"]
    size, count = latent[:2], batch["index"].shape[0]
    keys = sampling_keys(image_keys)
    entries = prior.conditioner.prepare(batch, first_stage, size, keys.conditions)
    cond, null = (prior.condition(entries, jnp.full(count, drop)) for drop in (False, True))
    preset = None
    if "known" in batch:
        f = first_stage.module.downsampling
        hole = nn.max_pool(batch["hole"], (f, f), (f, f))[..., 0]
        preset = (first_stage.indices({"image": batch["known"]}), hole == 0)
    codes = prior.sample(keys.steps, cond, null, size, latent[2], options, preset)
    images = jnp.clip(first_stage.decode_indices(codes), -1.0, 1.0)
    return images if preset is None else paste(images, batch["known"], batch["hole"])
