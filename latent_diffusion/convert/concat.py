"""Which conditioners fill the channels that a U-Net takes beside its latent.

Files don't say so themselves: the pipeline or the class that runs them knows. The number of
channels tells them apart (fact sheets of the paper's models and of Stable Diffusion's).
"""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert.bundle import Part
from latent_diffusion.convert.tensors import Tensor

NOISE_LEVEL = "noise_level/embedding"


def conditioners_for(
    in_channels: int,
    out_channels: int,
    text: bool,
    levels: Tensor | None = None,
    low_res: Mapping[str, Any] | None = None,
) -> dict[str, Part]:
    """The conditioners of a U-Net by its channels; none where they are only the latent's.

    text: whether it attends to a text, as Stable Diffusion does; the others are the paper's.
    levels: embeddings of noise levels. low_res: further fields of that conditioner.
    Raises ValueError for a number of channels that no known model has.
    """
    extra = in_channels - out_channels
    if levels is not None:
        if extra != 3:
            raise ValueError(
                f"a U-Net with a class embedding and {in_channels} input channels; known is the "
                "upscaler's, of a small picture's 3 channels beside the latent"
            )
        rows, width = levels.shape
        fields = {"num_levels": rows, "width": width, "keep": True, **(low_res or {})}
        return {"low_res": Part(fields, {NOISE_LEVEL: levels})}
    if extra == 0:
        return {}
    if text and extra == 1:
        return {"depth": Part({"keep": True}, {})}
    if text and extra == 1 + out_channels:
        fields = {"mask_first": True, "known_mask": 0.0, "hole": 0.0, "keep": True}
        return {"masked_image": Part(fields, {})}
    if not text and extra == out_channels + 1:
        return {"masked_image": Part({}, {})}
    if not text and extra == 3:
        return {"low_res": Part({}, {})}
    raise ValueError(
        f"a U-Net with {in_channels} input channels for a latent of {out_channels}: what the "
        "others mean isn't known"
    )
