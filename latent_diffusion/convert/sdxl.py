"""Stable Diffusion XL: how its two text encoders and its sizes condition the U-Net.

Files hold tensors and settings of parts; the facts here are of the pipelines that join them
(Podell et al. 2023): the penultimate states of both encoders without the final norm, and a vector
of the second one's text followed by the sinusoids of sizes. The refiner has the second alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.convert.settings import Fields

FOLDERS = {"text_encoder": "clip_text", "text_encoder_2": "clip_text_2"}
BASE, REFINER = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
INPAINT = "StableDiffusionXLInpaintPipeline"
TIME_WIDTH = 256  # of each size's sinusoid in the released models
_NUMBERS = {False: 6, True: 5}  # by whether the refiner's score stands for the target size


def is_sdxl(pipeline: str) -> bool:
    """Whether a pipeline of diffusers, by its class, runs Stable Diffusion XL."""
    return pipeline.startswith("StableDiffusionXL")


def text_fields(name: str, projection_dim: int | None, zero_null: bool) -> Fields:
    """How the encoder `name` is used.

    projection_dim: the width of the second one's vector. zero_null: whether the null condition is
    zeros, as in the base; else it is the empty prompt.
    """
    fields = {"skip_last": 1, "final_norm": False, "zero_null": zero_null}
    if name == "clip_text":
        return fields
    return {**fields, "projection_dim": projection_dim, "repad": True, "pad_id": 0}


def with_sizes(bundle: Bundle, where: Path, score: bool | None = None) -> Bundle:
    """The bundle with the conditioner of sizes that fills its U-Net's vector.

    score: whether the refiner's aesthetic score is the last number; None is by the vector's width.
    Raises ValueError for a model that lacks the encoder of the vector, or has another width.
    """
    assert bundle.unet is not None and bundle.time_width is not None
    vector, context = bundle.unet.params["label_emb_0/kernel"].shape[0], 0
    for name in FOLDERS.values():
        part = bundle.conditioners.get(name)
        context += 0 if part is None else part.fields["width"]
    second = bundle.conditioners.get("clip_text_2")
    if second is None:
        raise ValueError(f"{where}: it lacks the second text encoder, which gives the vector")
    wanted = bundle.unet.params["middle_block_1/transformer_blocks_0/attn2/to_k/kernel"].shape[0]
    if context != wanted:
        whole = "clip_text" in bundle.conditioners
        raise ValueError(
            f"{where}: its text encoders give a context of width {context}, its U-Net takes "
            f"{wanted}: {'one is' if whole else 'the first is missing, or the second'} another "
            "model's"
        )
    text, width = second.fields["projection_dim"], bundle.time_width
    if text is None:
        raise ValueError(
            f"{where}: it lacks the second text encoder's text_projection, which gives the vector"
        )
    widths = {kind: text + count * width for kind, count in _NUMBERS.items()}
    known = score if score is not None else vector == widths[True]
    if vector != widths[known]:
        raise ValueError(
            f"{where}: the U-Net's vector has {vector} numbers; a text's {text} and {width} for "
            f"each of {_NUMBERS[known]} sizes are {widths[known]}"
        )
    fields: dict[str, Any] = {"aesthetic_score": known, "width": width}
    sizes = {"sizes": Part(fields, {})}
    return replace(bundle, conditioners={**bundle.conditioners, **sizes})
