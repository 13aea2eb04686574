"""Stable Diffusion 3: how its three text encoders condition the transformer, and its single files.

Esser et al. 2024. The penultimate states of both CLIP encoders, without the final norm, are
concatenated and padded with zeros to T5's width; T5's states follow them. The vector joins the
pooled outputs of both CLIP encoders. A model without T5 has zeros in the place of T5's states. The
null condition is the empty prompt.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from latent_diffusion.convert import autoencoder, clip_text, mmdit, t5
from latent_diffusion.convert.autoencoder_diffusers import identities, without_identities
from latent_diffusion.convert.bundle import Bundle, Part, check_depth, input_widths, read_part
from latent_diffusion.convert.encoders import read_encoder
from latent_diffusion.convert.scheduler import from_diffusers
from latent_diffusion.convert.settings import Fields
from latent_diffusion.convert.tables import prefixed, read_tensors, within, write_tensors
from latent_diffusion.files.tensor import Tensor, in_memory

BASE, IMG2IMG = "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"
FOLDERS = {
    "text_encoder": "clip_text",
    "text_encoder_2": "clip_text_2",
    "text_encoder_3": "t5_text",
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
GUIDANCE, STEPS = 7.0, 28
SCALE, SHIFT = 1.5305, 0.0609  # of the latents in the released models
NETWORK, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
MARK = "joint_blocks.0.x_block.attn.qkv.weight"
_ENCODERS = {
    "clip_text": "text_encoders.clip_l.",
    "clip_text_2": "text_encoders.clip_g.",
    "t5_text": "text_encoders.t5xxl.",
}
_INNER = "transformer."
_PROJECTION = _INNER + clip_text.PROJECTION


def is_sd3(pipeline: str) -> bool:
    """Whether a pipeline class of diffusers runs Stable Diffusion 3."""
    return pipeline.startswith("StableDiffusion3")


def text_fields(name: str, projection_dim: int | None) -> Fields:
    """Fields for the use of the encoder `name`. projection_dim: the width of a CLIP's vector."""
    if name == "t5_text":
        return {}
    fields: Fields = {"skip_last": 1, "final_norm": False, "projection_dim": projection_dim}
    return fields if name == "clip_text" else {**fields, "repad": True, "pad_id": 0}


def with_encoders(bundle: Bundle, where: Path) -> Bundle:
    """The bundle with zeros in T5's place if it has no T5; ValueError if it lacks a CLIP encoder.

    A bundle without any encoder stays as it is.
    """
    assert bundle.mmdit is not None
    present, (_, context, vector) = bundle.conditioners, input_widths(bundle.mmdit)
    if not present.keys() & set(_ENCODERS):
        return bundle
    if missing := [name for name in ("clip_text", "clip_text_2") if name not in present]:
        raise ValueError(f"{where}: it lacks the text encoder {', '.join(missing)}")
    width = sum(present[name].fields["projection_dim"] for name in ("clip_text", "clip_text_2"))
    if width != vector:
        raise ValueError(
            f"{where}: its text encoders give a vector of {width} numbers, its transformer takes "
            f"{vector}"
        )
    if "t5_text" not in present:
        return bundle.with_part("t5_text", Part({"absent": True, "width": context}, {}))
    if (wide := present["t5_text"].fields["width"]) != context:
        raise ValueError(f"{where}: its T5 is {wide} wide, its transformer's context {context}")
    return bundle


# ---------------------------------------------------------------------------------- single files


def read(path: Path, tensors: Mapping[str, Tensor]) -> Bundle:
    """Read a single file: the transformer, perhaps with first stage and text encoders."""
    prefix = NETWORK if NETWORK + MARK in tensors else ""
    if not prefix:
        return _bundle(mmdit.read_original(path, tensors), "")
    beginnings = (prefix, FIRST_STAGE, *_ENCODERS.values())
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}
    read_tensors((), {}, rest, str(path))  # refuses tensors that belong to no part
    bundle = _bundle(mmdit.read_original(path, within(tensors, prefix)), prefix)
    if first_stage := within(tensors, FIRST_STAGE):
        bundle = replace(
            bundle, autoencoder=_read_first_stage(path, first_stage), scale_factor=SCALE,
            shift=SHIFT,
        )  # fmt: skip
    for name, beginning in _ENCODERS.items():
        if encoder_tensors := within(tensors, beginning):
            part, without = _read_encoder(path, name, encoder_tensors)
            notes = {**bundle.notes, "no_projection": without} if without else bundle.notes
            bundle = replace(bundle.with_part(name, part), notes=notes)
    return with_encoders(bundle, path)


def _bundle(part: Part, prefix: str) -> Bundle:
    diffusion, sampling = from_diffusers(SCHEDULER)
    sampling |= {"num_steps": STEPS, "guidance_scale": GUIDANCE}
    return Bundle(
        mmdit=part,
        diffusion=diffusion,
        sampling=sampling,
        image_size=8 * part.fields["base_size"],
        notes={"prefix": prefix},
    )


def _read_first_stage(path: Path, tensors: Mapping[str, Tensor]) -> Part:
    width = tensors["decoder.conv_in.weight"].shape[1]
    tensors = {**identities(width), **tensors}
    fields = autoencoder.fields_from_shapes(tensors)
    check_depth(path, fields, tensors)
    table, tree = autoencoder.compvis_table(fields), autoencoder.shapes(fields)
    return read_part(path, fields, table, tree, tensors)


def _read_encoder(path: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Part, bool]:
    """Read an encoder. Returns it, and whether the file lacks CLIP's projection.

    The projection is then the identity.
    """
    scale = {n: t for n, t in tensors.items() if n == "logit_scale"}
    tensors = within(tensors, _INNER)
    if name == "t5_text":
        part = read_encoder(name, path, tensors)
        return replace(part, unused={**part.unused, **scale}), False
    without = clip_text.PROJECTION not in tensors
    if without:
        words = tensors["text_model.embeddings.token_embedding.weight"]
        eye = in_memory(np.eye(words.shape[1], dtype=np.float32)).astype(words.dtype)
        tensors = {**tensors, clip_text.PROJECTION: eye}
    width = tensors[clip_text.PROJECTION].shape[0]
    chosen = text_fields(name, width)
    if name == "clip_text_2":
        chosen["activation"] = "gelu"
    part = read_encoder(name, path, tensors, chosen=chosen)
    return replace(part, unused={**part.unused, **scale}), without


def as_single(bundle: Bundle) -> dict[str, Tensor]:
    """The tensors of a single file, not yet read; ValueError where the format can't do it."""
    assert bundle.mmdit is not None
    diffusion, sampling = from_diffusers(SCHEDULER)
    noise = ("schedule", "num_timesteps", "prediction")  # a flow has no other field
    same = all(bundle.diffusion.get(name) == diffusion[name] for name in noise)
    if not same or bundle.sampling.get("shift") != sampling["shift"]:
        raise ValueError(
            "this format doesn't say how the noise is spaced, which must be that of the released "
            f"models, a flow with shift={sampling['shift']:g}; save it as diffusers"
        )
    prefix = bundle.notes.get("prefix", NETWORK)
    tensors = {prefix + n: t for n, t in mmdit.as_original(bundle.mmdit).items()}
    if bundle.autoencoder is not None:
        scaled = (float(bundle.scale_factor), float(bundle.shift))
        if not np.allclose(scaled, (SCALE, SHIFT), rtol=1e-6):
            raise ValueError(
                f"this format's latents have the scale {SCALE} and the shift {SHIFT}, this model "
                f"{scaled[0]:g} and {scaled[1]:g}; save it as diffusers"
            )
        table = autoencoder.compvis_table(bundle.autoencoder.fields)
        part_tensors = write_tensors(prefixed(table, FIRST_STAGE), bundle.autoencoder.params)
        tensors |= without_identities(part_tensors, FIRST_STAGE)
    for name, beginning in _ENCODERS.items():
        part = bundle.conditioners.get(name)
        if part is None or not part.params:
            continue
        part_tensors = _as_encoder(name, part)
        if name == "clip_text" and bundle.notes.get("no_projection"):
            part_tensors.pop(_PROJECTION)
        part_tensors |= {n: t for n, t in part.unused.items() if n == "logit_scale"}
        tensors |= {beginning + n: t for n, t in part_tensors.items()}
    return tensors


def _as_encoder(name: str, part: Part) -> dict[str, Tensor]:
    if name == "t5_text":
        return {_INNER + n: t for n, t in t5.transformers_tensors(part).items()}
    tensors = clip_text.transformers_tensors(part)
    named = {n if n == clip_text.PROJECTION else f"text_model.{n}": t for n, t in tensors.items()}
    return {_INNER + n: t for n, t in named.items()}
