"""The original's files: one .ckpt or .safetensors with the whole model, and a yaml beside it.

Without a yaml the architecture is read off the shapes of the tensors; the number of heads, the
schedule and the prediction, which shapes don't show, are those of the released model of this size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from latent_diffusion.convert import autoencoder, cond_stage, dit, tokenizers, unet, unet_compvis
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
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.convert.settings import Settings
from latent_diffusion.convert.tables import prefixed, read_tensors, within, write_tensors
from latent_diffusion.files.tensor import Tensor, TensorFile
from latent_diffusion.files.tensors import open_tensors, write_safetensors
from latent_diffusion.process.schedules import make_schedule

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
SAMPLING = {"sampler": "ddim", "num_steps": 50, "spacing": "original"}
# Tensors that are not read: schedules are computed anew, losses and averages serve training.
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
    """Settings of a released model that the shapes of its tensors don't show."""

    beta_start: float
    beta_end: float
    heads: Mapping[str, int]
    scale_factor: float = 1.0
    prediction: str = "eps"


# (model_channels, width of the context, channels of the latent) of each U-Net
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
_DIFFUSION = Settings(  # the yaml's names of our `diffusion` fields
    names={
        "beta_schedule": "schedule",
        "linear_start": "beta_start",
        "linear_end": "beta_end",
        "timesteps": "num_timesteps",
        "parameterization": "prediction",
    },
    defaults={
        "beta_schedule": "linear",
        "linear_start": 1e-4,
        "linear_end": 2e-2,
        "timesteps": 1000,
        "parameterization": "eps",
    },
)
_SD2_BASE_STEPS = 875_000  # of training: the checkpoint of SD v2 (and 2.1) that predicts eps


def read_compvis(
    path: Path, config: Path | None = None, ema: bool | None = None, tokenizer: Path | None = None
) -> Bundle:
    """Read a single file. Raises ValueError with the reason for refusing it.

    config: its yaml; None takes one of the same name beside the file, if there is one.
    ema: the averaged parameters of the U-Net (True), the live ones (False), or the averaged ones if
    the file has them (None).
    tokenizer: the tokenizer of the text encoder; None looks for one beside the file.
    """
    opened = open_tensors(path)
    beside = path.with_suffix(".yaml")
    config = beside if config is None and beside.is_file() else config
    params = _load_yaml(config) if config else {}
    try:
        bundle = _read(path, opened, params, ema)
    except (LookupError, TypeError, ArithmeticError, AttributeError) as error:
        names = "its tensors" if config is None else f"its tensors and {config}"
        raise ValueError(f"{path}: {names} describe no model of the original: {error!r}") from error
    tokenizer = tokenizer or tokenizers.beside(path, bundle.conditioners)
    return bundle if tokenizer is None else tokenizers.with_tokenizer(bundle, tokenizer)


def _read(path: Path, opened: TensorFile, params: Mapping[str, Any], ema: bool | None) -> Bundle:
    if "encoder.conv_in.weight" in opened.tensors:
        return Bundle(autoencoder=_read_first_stage(path, opened.tensors, params))
    if f"{UNET}input_blocks.0.0.weight" in opened.tensors:
        return _read_whole(path, opened, params, ema)
    if dit.PATCHES in opened.tensors:
        return dit.read_dit(path, opened.tensors)
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
    parts = {prefix: within(tensors, prefix) for prefix in prefixes}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    read_tensors((), {}, rest, str(path), IGNORED)  # refuses tensors that no part has
    table = parts[UNET].pop("label_emb.weight", None)
    projection = parts[UNET].get("middle_block.1.proj_in.weight")
    linear = projection is not None and len(projection.shape) == 2
    unet_part, released = _read_unet(path, parts[UNET], params, linear)
    conditioners = cond_stage.read(path, parts[COND_STAGE], params)
    conditioners |= cond_stage.read_embedder(path, parts[EMBEDDER], parts[AUGMENTOR], params)
    in_channels, context, _ = input_widths(unet_part)
    if "spatial_rescaler" not in conditioners:
        has_text = bool(conditioners.keys() & {"text", "clip_text"})
        out_channels = unet_part.fields["out_channels"]
        conditioners |= conditioners_for(in_channels, out_channels, has_text, table)
    diffusion = _diffusion(opened, params, released)
    bundle = Bundle(
        unet=unet_part,
        conditioners=conditioners,
        diffusion=diffusion,
        scale_factor=_scale_factor(tensors, params, released),
        sampling={**SAMPLING, "guidance_scale": 7.5 if "clip_text" in conditioners else 1.0},
        notes={
            "linear_projections": linear,
            "parameters": _which(opened.tensors, ema),
            "first_stage_twice": "encoder.conv_in.weight" in parts[COND_STAGE],
        },
    )
    if not parts[FIRST_STAGE]:
        return bundle
    settings = params.get("first_stage_config", {}).get("params")
    bundle = replace(bundle, autoencoder=_read_first_stage(path, parts[FIRST_STAGE], settings))
    side = params.get("image_size") or _side(unet_part.fields, context, diffusion["prediction"])
    return replace(bundle, image_size=side * bundle.downsampling)


def _read_unet(
    path: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any], linear: bool
) -> tuple[Part, Released | None]:
    """Read the U-Net; return the released model of its size, too."""
    fields, context = unet_compvis.fields_from_shapes(tensors), unet_compvis.context_dim(tensors)
    size = (fields["model_channels"], context, fields["out_channels"])
    released = RELEASED.get(size)
    if params:
        fields = unet_compvis.fields_from_yaml(params["unet_config"]["params"])
    elif released is None:
        raise ValueError(
            f"{path}: its U-Net (width {size[0]}, context {size[1]}, {size[2]} channels) is none "
            "of the released ones; put the model's yaml beside it under the same name"
        )
    else:
        fields |= released.heads
    vector = tensors.get("label_emb.0.0.weight")
    in_channels = tensors["input_blocks.0.0.weight"].shape[1]
    tree = unet.shapes(fields, in_channels, context, None if vector is None else vector.shape[1])
    return read_part(path, fields, unet.compvis_table(fields, linear), tree, tensors), released


def _read_first_stage(
    path: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any] | None
) -> Part:
    fields = (
        autoencoder.fields_from_yaml(params) if params else autoencoder.fields_from_shapes(tensors)
    )
    table, tree = autoencoder.compvis_table(fields), autoencoder.shapes(fields)
    return read_part(path, fields, table, tree, tensors, ignored=(r"loss\..*",))


def _side(fields: Mapping[str, Any], context: int | None, prediction: str) -> int:
    """The side of the latents on which a released model was trained."""
    if fields["out_channels"] == 16:
        return 48  # retrieval-augmented, 768²
    if (context, prediction) == (1024, "v"):
        return 96 if fields["model_channels"] == 320 else 128  # Stable Diffusion 2, its upscaler
    if fields["out_channels"] == 4 and context != 768 and fields["model_channels"] != 320:
        return 32  # the paper's with f = 8
    return 64 if context != 1280 else 32


def _choose_ema(path: Path, tensors: Mapping[str, Tensor], ema: bool | None) -> dict[str, Tensor]:
    """The tensors with the averaged U-Net in place of the live one, if wanted.

    The names of the averages are those of the live tensors without dots. Different names could lose
    their dots alike, so we go from the live names to the averages, never back.
    """
    live = [name for name in tensors if name.startswith(UNET)]
    averaged = {name: "model_ema." + name[len("model.") :].replace(".", "") for name in live}
    absent = [name for name in averaged.values() if name not in tensors]
    if ema is False or (ema is None and len(absent) == len(live)):
        return dict(tensors)
    if absent:
        raise ValueError(
            f"{path}: its averaged parameters lack {absent[0]}; load it with ema=False"
        )
    return {**tensors, **{name: tensors[averaged[name]] for name in live}}


def _scale_factor(
    tensors: Mapping[str, Tensor], params: Mapping[str, Any], released: Released | None
) -> float:
    """A buffer of the file if training measured it, else the yaml's or the released model's."""
    if "scale_factor" in tensors:
        return float(tensors["scale_factor"].read())
    if params:
        return float(params.get("scale_factor", 1.0))
    return released.scale_factor if released else 1.0


def _diffusion(
    opened: TensorFile, params: Mapping[str, Any], released: Released | None
) -> dict[str, Any]:
    """The `diffusion` fields: the yaml's, else those of the file's schedule or a released model."""
    if params:
        return {**_DIFFUSION.read(params, "LatentDiffusion"), "zero_terminal_snr": False}
    assert released is not None  # otherwise `_read_unet` has refused the file
    fields = {**ASSUMED, "beta_start": released.beta_start, "beta_end": released.beta_end}
    if "betas" in opened.tensors:
        betas = opened.tensors["betas"].read().astype(np.float64)
        fields |= recognise_schedule(make_schedule(betas=betas))
    is_base = opened.metadata.get("global_step") == _SD2_BASE_STEPS and released.prediction == "v"
    return {**fields, "prediction": "eps" if is_base else released.prediction}


def _which(tensors: Mapping[str, Tensor], ema: bool | None) -> str:
    """Whether the U-Net's parameters are averages, in words."""
    if "model_ema.decay" not in tensors and "model_ema.num_updates" not in tensors:
        return "the only ones in the file"
    return "live ones; the file has averages, too" if ema is False else "averages; live ones, too"


# --------------------------------------------------------------------------------------- writing

DDPM = "ldm.models.diffusion.ddpm"
# Classes of later versions of the original's code, by the conditioners of the model.
_TARGETS = {
    frozenset({"clip_text", "masked_image"}): f"{DDPM}.LatentInpaintDiffusion",
    frozenset({"clip_text", "depth"}): f"{DDPM}.LatentDepth2ImageDiffusion",
    frozenset({"clip_text", "low_res"}): f"{DDPM}.LatentUpscaleDiffusion",
    frozenset({"clip_text", "clip_image"}): f"{DDPM}.ImageEmbeddingConditionedLatentDiffusion",
}


def write_compvis(
    bundle: Bundle, path: Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write one .safetensors file under the original's names, and its yaml beside it.

    progress: is called with the number of elements of each tensor that is written. Raises
    ValueError where the original's code can't express the model.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a file of the original must end in .safetensors")
    if bundle.dit is not None:  # DiT's files have no yaml
        write_safetensors(path, dit.as_dit(bundle, path), progress=progress)
        return
    tensors, config = as_compvis(with_folded_scale(bundle))
    write_safetensors(path, tensors, progress=progress)
    text_of_yaml = yaml.safe_dump({"model": config}, sort_keys=False)
    path.with_suffix(".yaml").write_text(text_of_yaml, encoding="utf-8")


def as_compvis(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors under the original's names, still unread, and the `model` of its yaml."""
    tensors: dict[str, Tensor] = {}
    first_stage: dict[str, Any] = {}
    if bundle.autoencoder is not None:
        fields = bundle.autoencoder.fields
        first_stage = autoencoder.yaml_from_fields(fields)
        prefix = FIRST_STAGE if bundle.unet is not None else ""
        names = prefixed(autoencoder.compvis_table(fields), prefix)
        tensors |= write_tensors(names, bundle.autoencoder.params)
    if bundle.unet is None:
        if not tensors:
            raise ValueError("there is nothing to save: the model is empty")
        return tensors, first_stage
    if bundle.diffusion["zero_terminal_snr"]:
        raise ValueError("the original's code has no zero_terminal_snr; save it as diffusers")
    linear, fields = bundle.linear_projections, bundle.unet.fields
    widths, side = input_widths(bundle.unet), bundle.latent_size
    config = unet_compvis.yaml_from_fields(fields, widths, linear, side)
    tensors |= write_tensors(prefixed(unet.compvis_table(fields, linear), UNET), bundle.unet.params)
    if (table := table_of(bundle.conditioners)) is not None:
        tensors[f"{UNET}label_emb.weight"] = table
        config["params"]["num_classes"] = table.shape[0]
    condition, conditioner, key = cond_stage.write(bundle)
    tensors |= {COND_STAGE + name: tensor for name, tensor in condition.items()}
    embedder, further = cond_stage.write_embedder(bundle)
    tensors |= embedder
    params = {
        **{name: bundle.diffusion[field] for name, field in _DIFFUSION.names.items()},
        "image_size": side,
        "unet_config": config,
        "channels": fields["out_channels"],
        "scale_factor": float(bundle.scale_factor),
        **({"first_stage_config": first_stage} if first_stage else {}),
        "cond_stage_config": conditioner,
        "conditioning_key": key,
        **further,
    }
    target = _TARGETS.get(frozenset(bundle.conditioners), f"{DDPM}.LatentDiffusion")
    return tensors, {"target": target, "params": params}
