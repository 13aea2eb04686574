"""diffusers' folders: whole pipelines and single components, read and written.

A pipeline is a folder per component and a model_index.json that names their classes; a component
is a config.json and a weight file.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_diffusion.convert import autoencoder, clip_text, scheduler, text, tokenizers, unet
from latent_diffusion.convert.bundle import (
    Bundle,
    Part,
    input_widths,
    read_part,
    with_folded_scale,
)
from latent_diffusion.convert.concat import NOISE_LEVEL, conditioners_for
from latent_diffusion.convert.tables import below, write_tensors
from latent_diffusion.convert.tensors import Tensor, find_weights, open_tensors, write_safetensors
from latent_diffusion.types import lookup

log = logging.getLogger(__name__)

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
Progress = Callable[[int], Any]
Json = dict[str, Any]
# Guidance that a pipeline applies if nothing is said; others apply none.
_GUIDANCE = {"StableDiffusionUpscalePipeline": 9.0}
_STABLE_GUIDANCE = 7.5
_BESIDE_WEIGHTS = ("scheduler", "tokenizer", "low_res_scheduler")
_LOW_RES = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline or a component."""
    if (path / "model_index.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    config = _load_json(path / "config.json")
    return "_class_name" in config or "architectures" in config


def read_diffusers(path: Path, variant: str | None = None) -> Bundle:
    """Read a pipeline's or a component's folder. Raises ValueError with the reason for refusing.

    What only judges or prepares pictures (a safety checker, a depth estimator …) is left out.
    """
    if not (path / "model_index.json").is_file():
        return replace(_read_component(path, variant), diffusion=scheduler.ASSUMED)
    index = _load_json(path / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"can't read {path / 'model_index.json'}: it names no _class_name")
    bundle = Bundle(diffusion=scheduler.ASSUMED, notes={"pipeline": name})
    for component, kind in _components(path, index).items():
        if kind in COMPONENTS:
            bundle = _merge(bundle, _read_component(path / component, variant))
        elif component not in _BESIDE_WEIGHTS:
            log.warning("%s: its %s (%s) is left out", path, component, kind)
    bundle = _with_inputs(bundle, path, index)
    if (path / "scheduler").is_dir():
        bundle = _with_scheduler(bundle, _load_json(path / "scheduler" / "scheduler_config.json"))
    if (path / "tokenizer").is_dir() and bundle.conditioners.keys() & {"text", "clip_text"}:
        bundle = tokenizers.with_tokenizer(bundle, path / "tokenizer")
    side = bundle.notes.get("unet", {}).get("sample_size")
    if isinstance(side, int):
        bundle = replace(bundle, image_size=side * bundle.downsampling)
    return bundle


def _components(path: Path, index: Json) -> dict[str, str]:
    """Class by folder, of those that are there."""
    found = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if Path(name).name != name or not isinstance(entry[1], str):
            raise ValueError(f"{path}: its index names a component {name!r} of class {entry[1]!r}")
        found[name] = entry[1]
    return found


def _with_inputs(bundle: Bundle, path: Path, index: Json) -> Bundle:
    """The bundle with conditioners for what its U-Net takes beside the latent."""
    if bundle.unet is None:
        return bundle
    conditioners = dict(bundle.conditioners)
    if "low_res" in conditioners:  # which needs the pipeline's schedule
        config = {**_LOW_RES, "num_train_timesteps": 1000}
        if (path / "low_res_scheduler").is_dir():
            config |= _load_json(path / "low_res_scheduler" / "scheduler_config.json")
        if config["beta_schedule"] != "scaled_linear":
            raise ValueError(f"{path}: a low_res_scheduler of {config['beta_schedule']!r}")
        own = {
            "max_noise_level": index.get("max_noise_level", 350),
            "beta_start": config["beta_start"],
            "beta_end": config["beta_end"],
        }
        part = conditioners["low_res"]
        conditioners["low_res"] = Part({**part.fields, **own}, part.params)
    else:
        in_channels, _, _ = input_widths(bundle.unet)
        conditioners |= conditioners_for(
            in_channels, bundle.unet.fields["out_channels"], bool(conditioners)
        )
    return replace(bundle, conditioners=conditioners)


def _with_scheduler(bundle: Bundle, config: Json) -> Bundle:
    diffusion, sampling = scheduler.from_diffusers(config)
    name = bundle.notes["pipeline"]
    default = _STABLE_GUIDANCE if name.startswith("StableDiffusion") else 1.0
    sampling["guidance_scale"] = _GUIDANCE.get(name, default)
    notes = {**bundle.notes, "scheduler": config}
    return replace(bundle, diffusion=diffusion, sampling=sampling, notes=notes)


def _merge(whole: Bundle, part: Bundle) -> Bundle:
    own: dict[str, Any] = {
        "notes": {**whole.notes, **part.notes},
        "conditioners": {**whole.conditioners, **part.conditioners},
    }
    if part.autoencoder is not None:
        own.update(autoencoder=part.autoencoder, scale_factor=part.scale_factor, shift=part.shift)
        own["image_size"] = part.image_size
    if part.unet is not None:
        own["unet"] = part.unet
    return replace(whole, **own)


def _read_component(path: Path, variant: str | None) -> Bundle:
    config = _load_json(path / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or ["nothing"])[0]
    read = lookup(COMPONENTS, name, f"component in {path}")
    weights = find_weights(path, STEMS, variant)
    if weights is None:
        raise ValueError(f"{path} has a config.json but no weights ({' or '.join(STEMS)} …)")
    try:
        return read(weights, {**config, "_class_name": name}, open_tensors(weights).tensors)
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'} does not say {error}") from error


def _load_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"can't read {path}: not a JSON object")
    return content


def _read_autoencoder(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = autoencoder.fields_from_diffusers(config)
    table, tree = autoencoder.diffusers_table(fields), autoencoder.shapes(fields)
    part = read_part(where, fields, table, tree, autoencoder.with_new_names(tensors))
    # Old files don't say: Stable Diffusion's 0.18215, and 1 for the paper's VQ models.
    scale = config.get("scaling_factor", 1.0 if config["_class_name"] == "VQModel" else 0.18215)
    size = config.get("sample_size")
    return Bundle(
        autoencoder=part,
        scale_factor=scale,
        shift=config.get("shift_factor") or 0.0,
        image_size=size if isinstance(size, int) else 256,
        notes={"autoencoder": config},
    )


def _read_unet(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = unet.fields_from_diffusers(config)
    linear, own = bool(config.get("use_linear_projection", False)), dict(tensors)
    in_channels, out_channels = config["in_channels"], config["out_channels"]
    conditioners = {}
    if config.get("num_class_embeds") and "class_embedding.weight" in own:
        levels = own.pop("class_embedding.weight")
        conditioners = conditioners_for(in_channels, out_channels, True, levels)
    tree = unet.shapes(fields, in_channels, config.get("cross_attention_dim"), None)
    part = read_part(where, fields, unet.diffusers_table(fields, linear), tree, own)
    notes = {"linear_projections": linear, "unet": config}
    return Bundle(unet=part, conditioners=conditioners, notes=notes)


def _read_bert(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = text.fields_from_diffusers(config)
    table, tree = text.diffusers_table(fields), text.shapes(fields)
    part = read_part(where, fields, table, tree, tensors, text.UNUSED)
    return Bundle(conditioners={"text": part}, notes={"text": config})


def _read_clip(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    fields = clip_text.fields_from_config(config)
    table, tree = clip_text.transformers_table(fields), clip_text.shapes(fields)
    own = below(tensors, prefix)
    part = read_part(where, fields, table, tree, own, clip_text.unused(fields))
    notes = {"clip_text": config, "clip_text_prefix": prefix}
    return Bundle(conditioners={"clip_text": part}, notes=notes)


COMPONENTS: dict[str, Callable[[Path, Json, Mapping[str, Tensor]], Bundle]] = {
    "AutoencoderKL": _read_autoencoder,
    "VQModel": _read_autoencoder,
    "UNet2DModel": _read_unet,
    "UNet2DConditionModel": _read_unet,
    "LDMBertModel": _read_bert,
    "CLIPTextModel": _read_clip,
}


# --------------------------------------------------------------------------------------- writing

VERSION = "0.30.0"  # of diffusers, whose names for settings these are
PIPELINES = {  # by the conditioners; those of the paper say `vqvae` and `bert`
    (): "LDMPipeline",
    ("low_res",): "LDMSuperResolutionPipeline",
    ("text",): "LDMTextToImagePipeline",
    ("clip_text",): "StableDiffusionPipeline",
    ("clip_text", "masked_image"): "StableDiffusionInpaintPipeline",
    ("clip_text", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("clip_text", "low_res"): "StableDiffusionUpscalePipeline",
}
_LENGTH = 77  # tokens that LDMTextToImagePipeline makes of every prompt
# Arguments of a pipeline that we have nothing for.
_ABSENT = {
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionImg2ImgPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    "StableDiffusionUpscalePipeline": ("safety_checker", "feature_extractor", "watermarker"),
}


def write_diffusers(bundle: Bundle, path: Path, progress: Progress = lambda count: None) -> None:
    """Write a folder that diffusers loads: a pipeline, or a component where there is only one.

    A per-channel latent scale is folded into the autoencoder (`with_folded_scale`). A tokenizer of
    ours becomes one of the tokenizers library.
    """
    bundle = with_folded_scale(bundle)
    parts = [name for name, part in bundle.parts() if part.params]
    if not parts:
        raise ValueError("there is nothing to save: the model is empty")
    if len(parts) == 1:
        _write_component(bundle, parts[0], path, progress)
        return
    pipeline = _pipeline(bundle)
    index: Json = {"_class_name": pipeline, "_diffusers_version": VERSION}
    names = _folders(pipeline)
    for name in parts:
        if name == "low_res":  # a table of the U-Net's, and a schedule
            continue
        config = _write_component(bundle, name, path / names[name], progress)
        kind = config.get("_class_name") or config["architectures"][0]
        library = {"text": "latent_diffusion", "clip_text": "transformers"}.get(name, "diffusers")
        index[names[name]] = [library, kind]
    settings = bundle.notes.get("scheduler") or scheduler.to_diffusers(bundle.diffusion)
    _save_json(path / "scheduler" / "scheduler_config.json", settings)
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    if bundle.tokenizer is not None:
        kind = tokenizers.write_tokenizer(bundle.tokenizer, path / "tokenizer")
        index["tokenizer"] = ["transformers", kind]
    elif bundle.conditioners.keys() & {"text", "clip_text"}:
        index["tokenizer"] = [None, None]
    if pipeline == "StableDiffusionUpscalePipeline":
        index |= _write_low_res(bundle.conditioners["low_res"].fields, path)
    index |= {name: [None, None] for name in _ABSENT.get(pipeline, ())}
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    _save_json(path / "model_index.json", index)


def _pipeline(bundle: Bundle) -> str:
    """The class that runs the model: the one it came from, or one for its conditioners."""
    if "pipeline" in bundle.notes:
        return bundle.notes["pipeline"]
    kind = lookup(
        {" + ".join(key): name for key, name in PIPELINES.items()},
        " + ".join(sorted(bundle.conditioners)),
        "combination of conditioners for a pipeline of diffusers",
    )
    if kind == "LDMTextToImagePipeline" and bundle.conditioners["text"].fields["max_length"] != 77:
        return "StableDiffusionPipeline"  # which asks the tokenizer for the length
    return kind


def _folders(pipeline: str) -> dict[str, str]:
    if pipeline.startswith("LDM"):
        return {"autoencoder": "vqvae", "unet": "unet", "text": "bert"}
    encoder = "text_encoder"
    return {"autoencoder": "vae", "unet": "unet", "clip_text": encoder, "text": encoder}


def _write_low_res(fields: Mapping[str, Any], path: Path) -> Json:
    """The schedule that noises the small picture; returns what the index says of it."""
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": fields["num_levels"],
        **_LOW_RES,
        **{name: fields[name] for name in ("beta_start", "beta_end") if name in fields},
    }
    _save_json(path / "low_res_scheduler" / "scheduler_config.json", config)
    return {
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "max_noise_level": fields.get("max_noise_level", 350),
    }


def as_component(bundle: Bundle, name: str) -> "Written":
    """config.json, tensors (still unread) and file stem of one of a bundle's parts."""
    config, tensors, stem = lookup(_WRITERS, name, "part in a folder of diffusers")(bundle)
    config = {**config, **bundle.notes.get(name, {})}  # what it said when it was read
    if "architectures" not in config:
        config.setdefault("_diffusers_version", VERSION)
    else:
        config.pop("_class_name", None)
    return config, tensors, stem


def _write_component(bundle: Bundle, name: str, path: Path, progress: Progress) -> Json:
    config, tensors, stem = as_component(bundle, name)
    _save_json(path / "config.json", config)
    write_safetensors(path / f"{stem}.safetensors", tensors, progress=progress)
    return config


Written = tuple[Json, dict[str, Tensor], str]


def _write_autoencoder(bundle: Bundle) -> Written:
    assert bundle.autoencoder is not None
    fields = bundle.autoencoder.fields
    config = autoencoder.diffusers_from_fields(fields, bundle.image_size)
    config["scaling_factor"] = float(bundle.scale_factor)
    tensors = write_tensors(autoencoder.diffusers_table(fields), bundle.autoencoder.params)
    return config, tensors, STEMS[0]


def _write_unet(bundle: Bundle) -> Written:
    assert bundle.unet is not None
    fields, linear = bundle.unet.fields, bundle.linear_projections
    in_channels, context, _ = input_widths(bundle.unet)
    side = bundle.image_size // bundle.downsampling
    config = unet.diffusers_from_fields(fields, in_channels, context, linear, side)
    tensors = write_tensors(unet.diffusers_table(fields, linear), bundle.unet.params)
    low_res = bundle.conditioners.get("low_res")
    if low_res is not None and NOISE_LEVEL in low_res.params:
        tensors["class_embedding.weight"] = low_res.params[NOISE_LEVEL]
        config["num_class_embeds"] = low_res.params[NOISE_LEVEL].shape[0]
    return config, tensors, STEMS[0]


def _write_text(bundle: Bundle) -> Written:
    part = bundle.conditioners["text"]
    tensors = write_tensors(text.diffusers_table(part.fields), part.params)
    tensors |= text.head(part)  # diffusers' class insists on it
    return text.diffusers_from_fields(part.fields), tensors, "model"


def _write_clip(bundle: Bundle) -> Written:
    part = bundle.conditioners["clip_text"]
    prefix = bundle.notes.get("clip_text_prefix", "text_model.")
    tensors = {prefix + n: t for n, t in clip_text.transformers_tensors(part).items()}
    return clip_text.config_from_fields(part.fields), tensors, "model"


_WRITERS: dict[str, Callable[[Bundle], Written]] = {
    "autoencoder": _write_autoencoder,
    "unet": _write_unet,
    "text": _write_text,
    "clip_text": _write_clip,
}


def _save_json(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
