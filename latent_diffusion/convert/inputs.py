"""Which conditioners fill the inputs that a U-Net has beside its latent.

Files don't say so themselves: the pipeline or the class that runs them knows. The number of
channels tells those of the paper's models and of Stable Diffusion apart.
"""

from collections.abc import Mapping

from latent_diffusion.convert.bundle import Part
from latent_diffusion.files.tensor import Tensor

NOISE_LEVEL, CLASS = "noise_level/embedding", "embedding/embedding"


def conditioners_for(
    in_channels: int, out_channels: int, text: bool, table: Tensor | None = None
) -> dict[str, Part]:
    """The conditioners of a U-Net by its channels; none where they are only the latent's.

    text: whether it attends to a text, as Stable Diffusion does; the others are the paper's.
    table: embeddings by number, added to the timestep's: of noise levels, or of classes.
    Raises ValueError for a number of channels that no known model has.
    """
    extra = in_channels - out_channels
    if table is not None:
        return _of_table(table, in_channels, extra)
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


def _of_table(table: Tensor, in_channels: int, extra: int) -> dict[str, Part]:
    rows, width = table.shape
    if extra == 0:
        fields = {"num_classes": rows - 1, "width": width, "route": "vector"}
        return {"class_label": Part(fields, {CLASS: table})}
    if extra == 3:
        fields = {"num_levels": rows, "width": width, "keep": True}
        return {"low_res": Part(fields, {NOISE_LEVEL: table})}
    raise ValueError(
        f"a U-Net with a class embedding and {in_channels} input channels; known are classes "
        "without further channels, and the upscaler's, of a small picture's 3"
    )


def table_of(conditioners: Mapping[str, Part]) -> Tensor | None:
    """The embeddings by number among the conditioners' parameters, which others count to the U-Net.

    Classes that are a token of the context are none.
    """
    classes = conditioners.get("class_label")
    if classes is not None and classes.fields.get("route") == "vector":
        return classes.params[CLASS]
    low_res = conditioners.get("low_res")
    return None if low_res is None else low_res.params.get(NOISE_LEVEL)
