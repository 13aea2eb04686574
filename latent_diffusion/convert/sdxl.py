"""Stable Diffusion XL: how its two text encoders and its sizes condition the U-Net.

Files hold tensors and settings of single parts; this module has the facts of the pipelines that
join them (Podell et al. 2023): the context is the penultimate states of both encoders without the
final norm; the vector is the second encoder's pooled output, followed by the sinusoids of sizes.
The refiner has only the second encoder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.convert.settings import Fields

FOLDERS = {"text_encoder": "clip_text", "text_encoder_2": "clip_text_2"}
BASE, REFINER = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
INPAINT = "StableDiffusionXLInpaintPipeline"
TIME_WIDTH = 256  # width of each size's sinusoid in the released models
_NUMBERS = {False: 6, True: 5}  # of sizes; True: the refiner's score replaces the target size


def is_sdxl(pipeline: str) -> bool:
    """Whether a pipeline class of diffusers runs Stable Diffusion XL."""
    return pipeline.startswith("StableDiffusionXL")


def text_fields(name: str, projection_dim: int | None, zero_null: bool) -> Fields:
    """Fields for the use of the encoder `name`.

    projection_dim: the width of the second encoder's vector. zero_null: whether the null condition
    is zeros, as in the base model; else it is the empty prompt.
    """
    fields = {"skip_last": 1, "final_norm": False, "zero_null": zero_null}
    if name == "clip_text":
        return fields
    return {**fields, "projection_dim": projection_dim, "repad": True, "pad_id": 0}


def with_sizes(bundle: Bundle, where: Path, score: bool | None = None) -> Bundle:
    """The bundle with the conditioner of sizes, which fills the rest of its U-Net's vector.

    score: whether the last number is the refiner's aesthetic score; None infers it from the
    vector's width. Raises ValueError for a model without the second encoder, or of another width.
    """
    assert bundle.unet is not None and bundle.time_width is not None
    vector, context = bundle.unet.params["label_emb_0/kernel"].shape[0], 0
    for name in FOLDERS.values():
        part = bundle.conditioners.get(name)
        context += 0 if part is None else part.fields["width"]
    second = bundle.conditioners.get("clip_text_2")
    if second is None:
        raise ValueError(f"{where}: it lacks the second text encoder, which gives the vector")
    expected = bundle.unet.params["middle_block_1/transformer_blocks_0/attn2/to_k/kernel"].shape[0]
    if context != expected:
        whole = "clip_text" in bundle.conditioners
        raise ValueError(
            f"{where}: its text encoders give a context of width {context}, its U-Net takes "
            f"{expected}: {'one is' if whole else 'the first is missing, or the second'} another "
            "model's"
        )
    text, width = second.fields["projection_dim"], bundle.time_width
    if text is None:
        raise ValueError(
            f"{where}: it lacks the second text encoder's text_projection, which gives the vector"
        )
    widths = {kind: text + count * width for kind, count in _NUMBERS.items()}
    with_score = score if score is not None else vector == widths[True]
    if vector != widths[with_score]:
        raise ValueError(
            f"{where}: the U-Net's vector has {vector} numbers; a text's {text} and {width} for "
            f"each of {_NUMBERS[with_score]} sizes are {widths[with_score]}"
        )
    fields: dict[str, Any] = {"aesthetic_score": with_score, "width": width}
    sizes = {"sizes": Part(fields, {})}
    return replace(bundle, conditioners={**bundle.conditioners, **sizes})
