"""The original's files: one .ckpt or .safetensors with everything in it, and a yaml beside.

Where there is no yaml the architecture is read off the tensors' shapes, and what leaves no trace
in them (heads, schedule, prediction) is looked up among the released models.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from latent_diffusion.convert import autoencoder, cond_stage, tokenizers, unet, unet_compvis
from latent_diffusion.convert.bundle import (
    Bundle,
    Part,
    input_widths,
    read_part,
    recognise_schedule,
    with_folded_scale,
)
from latent_diffusion.convert.cond_stage import AUGMENTOR, EMBEDDER
from latent_diffusion.convert.inputs import conditioners_for, table_of
from latent_diffusion.convert.tables import prefixed, read_tensors, write_tensors
from latent_diffusion.files.tensor import Tensor, TensorFile
from latent_diffusion.files.tensors import open_tensors, write_safetensors
from latent_diffusion.process.schedules import make_schedule

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# Tensors that carry nothing: schedules are recomputed, losses and averages have no place here.
IGNORED = (
    r"model_ema\..*",
    r"(first_stage_model\.)?loss\..*",
    r"(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?(alphas_cumprod|betas)(_prev)?",
    r"sqrt_recip(m1)?_alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)",
    r"logvar|scale_factor|lvlb_weights",
    r"noise_augmentor\.(?!data_).*",
)


class Released(NamedTuple):
    """What the shapes of a released model don't tell, from its config."""

    beta_start: float
    beta_end: float
    heads: Mapping[str, int]
    scale_factor: float = 1.0
    prediction: str = "eps"


# (model_channels, width of the context, channels of the latent)
RELEASED = {
    (224, None, 3): Released(0.0015, 0.0195, {"num_head_channels": 32}),  # celeba, ffhq, beds
    (192, None, 4): Released(0.0015, 0.0155, {"num_heads": 8}),  # churches
    (256, 512, 4): Released(0.0015, 0.0195, {"num_head_channels": 32}),  # cin, f8
    (192, 512, 3): Released(0.0015, 0.0195, {"num_heads": 1}),  # cin v2
    (192, 640, 3): Released(0.0015, 0.0195, {"num_head_channels": 32}),  # text2img256
    (128, 512, 3): Released(0.0015, 0.0205, {"num_head_channels": 32}),  # layout2img
    (128, None, 3): Released(0.0015, 0.0205, {"num_heads": 8}),  # semantic synthesis
    (160, None, 3): Released(0.0015, 0.0155, {"num_head_channels": 32}),  # bsr_sr
    (256, None, 3): Released(0.0015, 0.0205, {"num_heads": 8}),  # inpainting_big
    (448, 768, 16): Released(0.0015, 0.015, {"num_head_channels": 32}, 0.22765929),  # retrieval
    (320, 1280, 4): Released(0.00085, 0.012, {"num_heads": 8}, 0.18215),  # txt2img-1p4B
    (320, 768, 4): Released(0.00085, 0.012, {"num_heads": 8}, 0.18215),  # SD v1
    (320, 1024, 4): Released(0.00085, 0.012, {"num_head_channels": 64}, 0.18215, "v"),  # SD v2
    (256, 1024, 4): Released(0.0001, 0.02, {"num_heads": 8}, 0.08333, "v"),  # SD x4 upscaler
}
_SD2_BASE_STEPS = 875_000  # the checkpoint of SD v2 (and 2.1) that predicts eps


def read_compvis(
    path: Path,
    config: Path | None = None,
    ema: bool | None = None,
    tokenizer: Path | None = None,
) -> Bundle:
    """Read a single file. config: its yaml; None looks for one of the same name beside it.

    ema: averaged parameters of the U-Net (True), the live ones (False), or the averaged ones if
    there are any (None). tokenizer: where that of a text encoder is; None looks beside the file.
    Raises ValueError with the reason for refusing the file.
    """
    opened = open_tensors(path)
    config = config or next((c for c in (path.with_suffix(".yaml"),) if c.is_file()), None)
    params = _load_yaml(config) if config else {}
    try:
        bundle = _read(path, opened, params, ema)
    except (LookupError, TypeError, ArithmeticError, AttributeError) as error:
        what = "its tensors" if config is None else f"its tensors and {config}"
        raise ValueError(f"{path}: {what} describe no model of the original: {error!r}") from error
    if tokenizer is None:
        tokenizer = tokenizers.beside(path, bundle.conditioners)
    return bundle if tokenizer is None else tokenizers.with_tokenizer(bundle, tokenizer)


def _read(path: Path, opened: TensorFile, params: Mapping[str, Any], ema: bool | None) -> Bundle:
    if "encoder.conv_in.weight" in opened.tensors:
        own = {"first_stage_config": {"params": params}}
        return Bundle(autoencoder=_read_first_stage(path, opened.tensors, own))
    if f"{UNET}input_blocks.0.0.weight" in opened.tensors:
        return _read_whole(path, opened, params, ema)
    some = ", ".join(list(opened.tensors)[:3])
    raise ValueError(f"{path}: no model of the original: its tensors are {some} …")


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a model's yaml: {error!r}") from error


def _read_whole(
    path: Path, opened: TensorFile, params: Mapping[str, Any], ema: bool | None
) -> Bundle:
    tensors = _choose_ema(path, opened.tensors, ema)
    prefixes = (UNET, FIRST_STAGE, COND_STAGE, EMBEDDER, AUGMENTOR)
    own = {name: _within(tensors, name) for name in prefixes}
    used = {name for prefix in own for name in tensors if name.startswith(prefix)}
    rest = {name: tensors[name] for name in tensors.keys() - used}
    read_tensors((), {}, rest, str(path), IGNORED)  # refuses what is neither used nor known
    table = own[UNET].pop("label_emb.weight", None)
    part, released = _read_unet(path, own[UNET], params)
    linear = own[UNET].get("middle_block.1.proj_in.weight")
    in_channels, context, _ = input_widths(part)
    conditioners = cond_stage.read(path, own[COND_STAGE], params)
    conditioners |= cond_stage.read_embedder(path, own[EMBEDDER], own[AUGMENTOR], params)
    if "spatial_rescaler" not in conditioners:
        text_to = bool(conditioners.keys() & {"text", "clip_text"})
        channels = in_channels, part.fields["out_channels"]
        conditioners |= conditioners_for(*channels, text_to, table)
    diffusion = _diffusion(opened, params, released)
    bundle = Bundle(
        unet=part,
        conditioners=conditioners,
        diffusion=diffusion,
        scale_factor=_scale_factor(tensors, params, released),
        sampling={**SAMPLING, "guidance_scale": 7.5 if "clip_text" in conditioners else 1.0},
        notes={
            "linear_projections": linear is not None and len(linear.shape) == 2,
            "parameters": _which(opened.tensors, ema),
            "first_stage_twice": "encoder.conv_in.weight" in own[COND_STAGE],
        },
    )
    if not own[FIRST_STAGE]:
        return bundle
    bundle = replace(bundle, autoencoder=_read_first_stage(path, own[FIRST_STAGE], params))
    side = params.get("image_size") or _side(part.fields, context, diffusion["prediction"])
    return replace(bundle, image_size=side * bundle.downsampling)


def _read_unet(
    path: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
) -> tuple[Part, Released | None]:
    """The U-Net, and which of the released ones it is."""
    fields, context = unet_compvis.fields_from_shapes(tensors), unet_compvis.context_dim(tensors)
    key = (fields["model_channels"], context, fields["out_channels"])
    released = RELEASED.get(key)
    if params:
        fields = unet_compvis.fields_from_yaml(params["unet_config"]["params"])
    elif released is None:
        raise ValueError(
            f"{path}: its U-Net (width {key[0]}, context {key[1]}, {key[2]} channels) is none of "
            "the released ones; put the model's yaml beside it under the same name"
        )
    else:
        fields = {**fields, **released.heads}
    projection = tensors.get("middle_block.1.proj_in.weight")
    linear = projection is not None and len(projection.shape) == 2
    vector = tensors.get("label_emb.0.0.weight")
    in_channels = tensors["input_blocks.0.0.weight"].shape[1]
    tree = unet.shapes(fields, in_channels, context, None if vector is None else vector.shape[1])
    return read_part(path, fields, unet.compvis_table(fields, linear), tree, tensors), released


def _read_first_stage(path: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Part:
    given = params.get("first_stage_config", {}).get("params")
    fields = (
        autoencoder.fields_from_yaml(given) if given else autoencoder.fields_from_shapes(tensors)
    )
    table, tree = autoencoder.compvis_table(fields), autoencoder.shapes(fields)
    return read_part(path, fields, table, tree, tensors, ignored=(r"loss\..*",))


def _side(fields: Mapping[str, Any], context: int | None, prediction: str) -> int:
    """Of the latents that a released model was trained on."""
    if fields["out_channels"] == 16:
        return 48  # retrieval-augmented, 768²
    if (context, prediction) == (1024, "v"):
        return 96 if fields["model_channels"] == 320 else 128  # Stable Diffusion 2, its upscaler
    if fields["out_channels"] == 4 and context != 768 and fields["model_channels"] != 320:
        return 32  # the paper's with f = 8
    return 64 if context != 1280 else 32


SAMPLING = {"sampler": "ddim", "num_steps": 50, "spacing": "original"}


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


def _choose_ema(path: Path, tensors: Mapping[str, Tensor], ema: bool | None) -> dict[str, Tensor]:
    """The tensors with the averaged U-Net in place of the live one, if wanted.

    The average's names are the live ones without dots. That isn't one to one in general, so they
    are made from the live names, never taken apart.
    """
    live = [name for name in tensors if name.startswith(UNET)]
    averaged = {name: "model_ema." + name[len("model.") :].replace(".", "") for name in live}
    there = [name for name in live if averaged[name] in tensors]
    if ema is False or (ema is None and not there):
        return dict(tensors)
    if len(there) != len(live):
        absent = next(averaged[name] for name in live if averaged[name] not in tensors)
        raise ValueError(f"{path}: its averaged parameters lack {absent}; load it with ema=False")
    return {**tensors, **{name: tensors[averaged[name]] for name in live}}


def _scale_factor(
    tensors: Mapping[str, Tensor], params: Mapping[str, Any], released: Released | None
) -> float:
    """A buffer of the file if it was measured in training, else from the yaml."""
    if "scale_factor" in tensors:
        return float(tensors["scale_factor"].read())
    if params:
        return float(params.get("scale_factor", 1.0))
    return released.scale_factor if released else 1.0


def _diffusion(
    opened: TensorFile, params: Mapping[str, Any], released: Released | None
) -> dict[str, Any]:
    schedule: dict[str, Any] = {"schedule": "linear", "num_timesteps": 1000}
    schedule["zero_terminal_snr"] = False
    prediction = "eps"
    if params:
        schedule["schedule"] = params.get("beta_schedule", "linear")
        schedule["num_timesteps"] = params.get("timesteps", 1000)
        schedule["beta_start"] = params.get("linear_start", 1e-4)
        schedule["beta_end"] = params.get("linear_end", 2e-2)
        prediction = params.get("parameterization", "eps")
    elif released is not None:
        schedule.update(beta_start=released.beta_start, beta_end=released.beta_end)
        prediction = released.prediction
        if prediction == "v" and opened.metadata.get("global_step") == _SD2_BASE_STEPS:
            prediction = "eps"
    if "betas" in opened.tensors and not params:
        betas = opened.tensors["betas"].read().astype(np.float64)
        schedule = recognise_schedule(make_schedule(betas=betas))
    return {**schedule, "prediction": prediction}


def _which(tensors: Mapping[str, Tensor], ema: bool | None) -> str:
    """Whether the U-Net's parameters are averages, for those who ask."""
    if "model_ema.decay" not in tensors and "model_ema.num_updates" not in tensors:
        return "the only ones in the file"
    return "live ones; the file has averages, too" if ema is False else "averages; live ones, too"


# --------------------------------------------------------------------------------------- writing


def write_compvis(
    bundle: Bundle, path: Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write one .safetensors file under the original's names, and its yaml beside it.

    Raises ValueError where the original's code can't express the model.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: the name of a file in the original's format ends in .safetensors"
        )
    bundle = with_folded_scale(bundle)
    tensors, config = as_compvis(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, progress=progress)
    text_of_yaml = yaml.safe_dump({"model": config}, sort_keys=False)
    path.with_suffix(".yaml").write_text(text_of_yaml, encoding="utf-8")


def as_compvis(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the original's names, still unread, and the `model` of its yaml."""
    tensors: dict[str, Tensor] = {}
    first_stage: dict[str, Any] = {}
    if bundle.autoencoder is not None:
        fields = bundle.autoencoder.fields
        first_stage = autoencoder.yaml_from_fields(fields)
        prefix = FIRST_STAGE if bundle.unet is not None else ""
        table = prefixed(autoencoder.compvis_table(fields), prefix)
        tensors.update(write_tensors(table, bundle.autoencoder.params))
    if bundle.unet is None:
        if not tensors:
            raise ValueError("there is nothing to save: the model is empty")
        return tensors, first_stage
    linear, side = bundle.linear_projections, bundle.image_size // bundle.downsampling
    own = unet_compvis.yaml_from_fields(bundle.unet.fields, input_widths(bundle.unet), linear, side)
    names = prefixed(unet.compvis_table(bundle.unet.fields, linear), UNET)
    tensors.update(write_tensors(names, bundle.unet.params))
    params = {**_yaml_diffusion(bundle.diffusion), "image_size": side, "unet_config": own}
    params["channels"] = bundle.unet.fields["out_channels"]
    params["scale_factor"] = float(bundle.scale_factor)
    if first_stage:
        params["first_stage_config"] = first_stage
    if (numbered := table_of(bundle.conditioners)) is not None:
        tensors[f"{UNET}label_emb.weight"] = numbered
        own["params"]["num_classes"] = numbered.shape[0]
    condition, conditioner, key = cond_stage.write(bundle)
    tensors.update({COND_STAGE + name: tensor for name, tensor in condition.items()})
    params["cond_stage_config"] = conditioner
    params["conditioning_key"] = key
    embedder, further = cond_stage.write_embedder(bundle)
    tensors.update(embedder)
    params.update(further)
    target = _TARGETS.get(frozenset(bundle.conditioners), f"{DDPM}.LatentDiffusion")
    return tensors, {"target": target, "params": params}


DDPM = "ldm.models.diffusion.ddpm"
# Classes of later versions of the original's code, by what they condition on.
_TARGETS = {
    frozenset({"clip_text", "masked_image"}): f"{DDPM}.LatentInpaintDiffusion",
    frozenset({"clip_text", "depth"}): f"{DDPM}.LatentDepth2ImageDiffusion",
    frozenset({"clip_text", "low_res"}): f"{DDPM}.LatentUpscaleDiffusion",
    frozenset({"clip_text", "clip_image"}): f"{DDPM}.ImageEmbeddingConditionedLatentDiffusion",
}


def _yaml_diffusion(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    if diffusion["zero_terminal_snr"]:
        raise ValueError("the original's code has no zero_terminal_snr; save it as diffusers")
    return {
        "beta_schedule": diffusion["schedule"],
        "linear_start": diffusion["beta_start"],
        "linear_end": diffusion["beta_end"],
        "timesteps": diffusion["num_timesteps"],
        "parameterization": diffusion["prediction"],
    }
