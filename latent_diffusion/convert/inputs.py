"""Choose the conditioners that fill the inputs that a U-Net has beside its latent.

Files don't name them: the pipeline or the class that runs the model implies them. The number of
channels distinguishes the models of the paper and those of Stable Diffusion.
"""

from collections.abc import Mapping

from latent_diffusion.convert.bundle import Bundle, Part, input_widths
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.conditioners import CONDITIONERS

NOISE_LEVEL, CLASS = "noise_level/embedding", "embedding/embedding"
_CONCATENATED = ("masked_image", "low_res", "depth")
_NOISE = ("max_noise_level", "beta_start", "beta_end")  # fields of low_res that files hold


def conditioners_for(
    in_channels: int, out_channels: int, text: bool, table: Tensor | None = None
) -> dict[str, Part]:
    """Return the conditioners for a U-Net's channels; none where it takes the latent alone.

    text: whether the U-Net attends to a text, as Stable Diffusion's does; otherwise it is taken for
    one of the paper. table: embeddings [N D] of noise levels or of classes, which are added to the
    timestep's embedding. Raises ValueError for a number of channels that no released model has.
    """
    extra = in_channels - out_channels
    rows, width = (0, 0) if table is None else table.shape
    if table is not None and extra == 0:
        fields = {"num_classes": rows - 1, "width": width, "route": "vector"}
        return {"class_label": Part(fields, {CLASS: table})}
    if table is not None and extra == 3:
        fields = {"num_levels": rows, "width": width, "keep": True}
        return {"low_res": Part(fields, {NOISE_LEVEL: table})}
    if table is not None:
        raise ValueError(
            f"a U-Net with a class embedding and {in_channels} input channels; supported are "
            "classes without further channels, and an upscaler with a small picture's 3"
        )
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
        f"a U-Net with {in_channels} input channels for a latent of {out_channels}: no released "
        "model shows the meaning of the others"
    )


def table_of(conditioners: Mapping[str, Part]) -> Tensor | None:
    """Return the embeddings [N D] of classes or noise levels that other libraries' U-Nets contain.

    They are parameters of our conditioners. None where there are no such embeddings; those of
    classes that are tokens of the context don't count.
    """
    classes = conditioners.get("class_label")
    if classes is not None and classes.fields.get("route") == "vector":
        return classes.params[CLASS]
    low_res = conditioners.get("low_res")
    return None if low_res is None else low_res.params.get(NOISE_LEVEL)


def check_inputs(bundle: Bundle) -> None:
    """Raise ValueError where a file's readers would take the U-Net's further channels for others.

    Files don't say how a mask, a small picture or a depth map enters the U-Net; see
    `conditioners_for`.
    """
    names = [name for name in _CONCATENATED if name in bundle.conditioners]
    if bundle.unet is None or not names:
        return
    text = bool(bundle.conditioners.keys() & {"text", "clip_text", "clip_text_2"})
    channels, out_channels = input_widths(bundle.unet)[0], bundle.unet.fields["out_channels"]
    table = table_of(bundle.conditioners)
    taken = conditioners_for(channels, out_channels, text, table)
    for name in names:
        module, skipped = CONDITIONERS[name], set(_NOISE)
        ours = module(**bundle.conditioners[name].fields)
        theirs = module(**taken[name].fields if name in taken else {})
        if not getattr(ours, "num_levels", 1):  # then no level is embedded
            skipped.add("width")
        for field in module.__dataclass_fields__:
            own, usual = getattr(ours, field), getattr(theirs, field)
            if field not in skipped and own != usual:
                raise ValueError(
                    f"readers of this format take {name}.{field}={usual}, this model has {own}; "
                    "save it as orbax"
                )
