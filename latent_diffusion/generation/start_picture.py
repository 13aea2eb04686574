"""The picture that a sampling call changes, resized to the result."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from latent_diffusion.data import windows
from latent_diffusion.data.transforms import to_float, to_uint8
from latent_diffusion.generation import conditions, controls


def changes_pictures(keys: Collection[str]) -> bool:
    """Whether a model can change a picture; it can't if its `image` is a condition without mask.

    keys: batch entries that the model reads as conditions.
    """
    return "image" not in keys or "mask" in keys


def usual_size(model: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of the result where a call names none: of its hints, its maps, or training pictures.

    given: the arguments of `Model.sample`. The picture that it changes is resized to this size.
    """
    maps = {name: given.get(name) for name in ("segmentation", "low_res")}
    size: tuple[int, int] = (
        controls.size_of(given.get("controls", ()))
        or conditions.size_of(maps, model.downsampling)
        or model.trained_size
    )
    return size


def fitted(
    keys: Collection[str],
    size: tuple[int, int],
    image: Float[np.ndarray, "1 H W 3"] | None,
    mask: Float[np.ndarray, "1 h w 1"] | None,
    strength: float | None,
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The entries `image` and `mask`, cropped to their middle and resized to `size` (H, W).

    keys: batch entries that the model reads as conditions. An image that is only a condition is
    left out, since it may have any size. Values of a mask become 0 or 1. Raises ValueError for a
    mask of another size than its image.
    """
    if image is None or (not changes_pictures(keys) and mask is None and strength is None):
        return {}
    entries = {"image": to_float(windows.fit(to_uint8(image[0]), size))[None]}
    if mask is not None:
        if mask.shape[1:3] != image.shape[1:3]:
            pixels = [f"{shape[2]}×{shape[1]}" for shape in (mask.shape, image.shape)]
            raise ValueError(f"mask has {pixels[0]} pixels, but image has {pixels[1]}")
        holes = windows.fit((255 * mask[0]).astype(np.uint8), size, mask=True)
        entries["mask"] = (holes[None] > 127).astype(np.float32)
    return entries
