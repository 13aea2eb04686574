"""Make conditions from an example: small pictures, holes, layouts."""

from collections.abc import Callable
from typing import Any

import numpy as np

from latent_diffusion.core.types import lookup
from latent_diffusion.data.degradations import DEGRADATIONS, degrade
from latent_diffusion.data.layout import Box, LayoutTokens, Object, as_objects, mirrored
from latent_diffusion.data.masks import MASKS, draw_mask
from latent_diffusion.data.sources import Example


def make_conditions(data_config: Any, train: bool) -> Callable[..., Example]:
    """Return `conditions(example, image, crop, flip, rng)`, which makes those of `data_config`.

    image: uint8 [S S 3], cut and flipped for training. crop, flip: the part of the example's
    picture that it shows, and whether it is flipped. Returns pictures as uint8.
    """
    low_res, mask = data_config.get("low_res", ""), data_config.get("mask", "")
    layout = dict(data_config.get("layout") or {})
    tokens = LayoutTokens(**layout) if layout.get("vocab_size") else None
    if low_res:
        lookup(DEGRADATIONS, low_res, "data.low_res")
    if mask:
        lookup(MASKS, mask, "data.mask")

    def conditions(
        example: Example, image: Any, crop: Box, flip: bool, rng: np.random.Generator
    ) -> Example:
        out: Example = {}
        if low_res:
            out["low_res"] = degrade(image, low_res, data_config.low_res_factor, rng)
        if mask:
            out["mask"] = draw_mask(mask, data_config.image_size, rng)
        if tokens is not None:
            if "boxes" not in example:
                raise ValueError(f"no boxes for a layout; the example has: {', '.join(example)}")
            try:
                objects = as_objects(example["boxes"], example.get("labels", ()))
            except ValueError as error:
                raise ValueError(f"{example.get('name', 'an example')}: {error}") from None
            if flip:
                objects = [Object(label, mirrored(box)) for label, box in objects]
                crop = mirrored(crop)
            out["layout"] = tokens.build(objects, crop, rng if train else None)
        return out

    return conditions
