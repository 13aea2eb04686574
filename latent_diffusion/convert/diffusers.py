"""diffusers' folders: pipelines, read and written; for their components see `components`.

A pipeline is a folder per component, and a model_index.json that names their classes.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_diffusion.convert import clip_image, scheduler, tokenizers
from latent_diffusion.convert.bundle import Bundle, Part, input_widths, with_folded_scale
from latent_diffusion.convert.components import (
    COMPONENTS,
    IMAGE_ENCODER,
    VERSION,
    Json,
    Progress,
    load_json,
    open_weights,
    read_component,
    save_json,
    write_component,
)
from latent_diffusion.convert.inputs import conditioners_for, table_of
from latent_diffusion.convert.tables import read_tensors, write_tensors
from latent_diffusion.files.tensors import write_safetensors

log = logging.getLogger(__name__)

UPSCALE, UNCLIP = "StableDiffusionUpscalePipeline", "StableUnCLIPImg2ImgPipeline"
# Guidance that a pipeline applies if nothing is said; others apply none.
_GUIDANCE = {UPSCALE: 9.0, UNCLIP: 10.0}
_STABLE_GUIDANCE = 7.5
# Without weights of their own, or read with the component that they serve.
_BESIDE_WEIGHTS = (
    "scheduler", "tokenizer", "low_res_scheduler", "image_noising_scheduler", "image_normalizer",
)  # fmt: skip
_COSINE = "squaredcos_cap_v2"
_LOW_RES = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline or a component."""
    if (path / "model_index.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    config = load_json(path / "config.json")
    return "_class_name" in config or "architectures" in config


def read_diffusers(path: Path, variant: str | None = None) -> Bundle:
    """Read a pipeline's or a component's folder. Raises ValueError with the reason for refusing.

    What only judges or prepares pictures (a safety checker, a depth estimator …) is left out.
    """
    if not (path / "model_index.json").is_file():
        return replace(read_component(path, variant), diffusion=scheduler.ASSUMED)
    index = load_json(path / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"can't read {path / 'model_index.json'}: it names no _class_name")
    bundle = Bundle(diffusion=scheduler.ASSUMED, notes={"pipeline": name})
    for component, kind in _components(path, index).items():
        # Stable Diffusion's have an image encoder for adapters, which aren't theirs.
        if kind in COMPONENTS and (kind != IMAGE_ENCODER or name == UNCLIP):
            bundle = _merge(bundle, read_component(path / component, variant))
        elif component not in _BESIDE_WEIGHTS:
            log.warning("%s: its %s (%s) is left out", path, component, kind)
    bundle = _with_inputs(bundle, path, index, variant)
    if (path / "scheduler").is_dir():
        bundle = _with_scheduler(bundle, load_json(path / "scheduler" / "scheduler_config.json"))
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


def _with_inputs(bundle: Bundle, path: Path, index: Json, variant: str | None) -> Bundle:
    """The bundle with conditioners for what its U-Net takes beside the latent."""
    if bundle.unet is None:
        return bundle
    conditioners = dict(bundle.conditioners)
    if "low_res" in conditioners:
        conditioners["low_res"] = _low_res_noised(conditioners["low_res"], path, index)
    elif "clip_image" in conditioners:
        conditioners["clip_image"] = _image_noised(conditioners["clip_image"], path, variant)
    elif "class_label" not in conditioners:
        in_channels, _, vector = input_widths(bundle.unet)
        if vector is not None:
            raise ValueError(f"{path}: what its U-Net's vector of {vector} numbers is isn't known")
        out_channels = bundle.unet.fields["out_channels"]
        conditioners |= conditioners_for(in_channels, out_channels, bool(conditioners))
    return replace(bundle, conditioners=conditioners)


def _low_res_noised(part: Part, path: Path, index: Json) -> Part:
    """The upscaler's small picture, as its pipeline noises it."""
    config = {**_LOW_RES, "num_train_timesteps": 1000}
    if (path / "low_res_scheduler").is_dir():
        config |= load_json(path / "low_res_scheduler" / "scheduler_config.json")
    if config["beta_schedule"] != "scaled_linear":
        raise ValueError(f"{path}: a low_res_scheduler of {config['beta_schedule']!r}")
    own = {
        "max_noise_level": index.get("max_noise_level", 350),
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
    }
    return Part({**part.fields, **own}, part.params)


def _image_noised(part: Part, path: Path, variant: str | None) -> Part:
    """unCLIP's picture, whose embedding is noised between two changes of scale."""
    config = load_json(path / "image_noising_scheduler" / "scheduler_config.json")
    if config.get("beta_schedule") != _COSINE:
        raise ValueError(f"{path}: an image_noising_scheduler of {config.get('beta_schedule')!r}")
    weights, tensors = open_weights(path / "image_normalizer", variant)
    shapes = dict.fromkeys(clip_image.STATISTICS, (part.fields["projection_dim"],))
    found = read_tensors(clip_image.statistics_table(), shapes, tensors, str(weights))
    fields = {**part.fields, "num_levels": config.get("num_train_timesteps", 1000)}
    return Part(fields, {**part.params, **found}, part.unused)


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


# --------------------------------------------------------------------------------------- writing

PIPELINES = {  # by the conditioners; those of the paper say `vqvae` and `bert`
    (): "LDMPipeline",
    ("low_res",): "LDMSuperResolutionPipeline",
    ("text",): "LDMTextToImagePipeline",
    ("clip_text",): "StableDiffusionPipeline",
    ("clip_text", "masked_image"): "StableDiffusionInpaintPipeline",
    ("clip_text", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("clip_text", "low_res"): UPSCALE,
    ("clip_image", "clip_text"): UNCLIP,
}
_LIBRARIES = {"text": "latent_diffusion"} | dict.fromkeys(
    ("clip_text", "clip_image"), "transformers"
)
_LENGTH = 77  # tokens that LDMTextToImagePipeline makes of every prompt
# Arguments of a pipeline that we have nothing for.
_ABSENT = {
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionImg2ImgPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    UPSCALE: ("safety_checker", "feature_extractor", "watermarker"),
}


def write_diffusers(bundle: Bundle, path: Path, progress: Progress = lambda count: None) -> None:
    """Write a folder that diffusers loads: a pipeline, or a component where there is only one.

    A per-channel latent scale is folded into the autoencoder (`with_folded_scale`). A tokenizer of
    ours becomes one of the tokenizers library.
    """
    bundle = with_folded_scale(bundle)
    table = table_of(bundle.conditioners)
    parts = [name for name, part in bundle.parts() if part.params]
    if table is not None:  # which is the U-Net's
        parts = [name for name in parts if name not in ("low_res", "class_label")]
    if not parts:
        raise ValueError("there is nothing to save: the model is empty")
    if len(parts) == 1:
        write_component(bundle, parts[0], path, progress)
        return
    pipeline = _pipeline(bundle)
    index: Json = {"_class_name": pipeline, "_diffusers_version": VERSION}
    names = _folders(pipeline)
    for name in parts:
        config = write_component(bundle, name, path / names[name], progress)
        kind = config.get("_class_name") or config["architectures"][0]
        index[names[name]] = [_LIBRARIES.get(name, "diffusers"), kind]
    settings = bundle.notes.get("scheduler") or scheduler.to_diffusers(bundle.diffusion)
    save_json(path / "scheduler" / "scheduler_config.json", settings)
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    if bundle.tokenizer is not None:
        kind = tokenizers.write_tokenizer(bundle.tokenizer, path / "tokenizer")
        index["tokenizer"] = ["transformers", kind]
    elif bundle.conditioners.keys() & {"text", "clip_text"}:
        index["tokenizer"] = [None, None]
    if pipeline == UPSCALE:
        index |= _write_low_res(bundle.conditioners["low_res"].fields, path)
    if pipeline == UNCLIP:
        index |= _write_image_noising(bundle.conditioners["clip_image"], path)
    index |= {name: [None, None] for name in _ABSENT.get(pipeline, ())}
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    save_json(path / "model_index.json", index)


def _pipeline(bundle: Bundle) -> str:
    """The class that runs the model: the one it came from, or one for its conditioners."""
    if "pipeline" in bundle.notes:
        return bundle.notes["pipeline"]
    conditioners = tuple(sorted(bundle.conditioners))
    if conditioners not in PIPELINES:
        known = ", ".join(" + ".join(names) or "nothing" for names in PIPELINES)
        raise ValueError(
            f"diffusers has no pipeline for models conditioned by {' + '.join(conditioners)}, only "
            f"by {known}; save it as orbax"
        )
    if conditioners == ("text",) and bundle.conditioners["text"].fields["max_length"] != _LENGTH:
        return PIPELINES["clip_text",]  # which asks the tokenizer for the length
    return PIPELINES[conditioners]


def _folders(pipeline: str) -> dict[str, str]:
    if pipeline.startswith("LDM"):
        return {"autoencoder": "vqvae", "unet": "unet", "text": "bert"}
    encoders = {"clip_text": "text_encoder", "text": "text_encoder", "clip_image": "image_encoder"}
    return {"autoencoder": "vae", "unet": "unet", **encoders}


def _write_low_res(fields: Mapping[str, Any], path: Path) -> Json:
    """The schedule that noises the small picture; returns what the index says of it."""
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": fields["num_levels"],
        **_LOW_RES,
        **{name: fields[name] for name in ("beta_start", "beta_end") if name in fields},
    }
    save_json(path / "low_res_scheduler" / "scheduler_config.json", config)
    return {
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "max_noise_level": fields.get("max_noise_level", 350),
    }


def _write_image_noising(part: Part, path: Path) -> Json:
    """What surrounds unCLIP's image encoder; returns what the index says of it."""
    fields = part.fields
    statistics = {name: part.params[name] for name in clip_image.STATISTICS}
    tensors = write_tensors(clip_image.statistics_table(), statistics)
    kind, folder = "StableUnCLIPImageNormalizer", path / "image_normalizer"
    own = {"_class_name": kind, "_diffusers_version": VERSION}
    save_json(folder / "config.json", {**own, "embedding_dim": fields["projection_dim"]})
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    own["_class_name"] = "DDPMScheduler"
    schedule = {"num_train_timesteps": fields["num_levels"], "beta_schedule": _COSINE}
    save_json(path / "image_noising_scheduler" / "scheduler_config.json", {**own, **schedule})
    side = fields["image_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    save_json(path / "feature_extractor" / "preprocessor_config.json", processor)
    return {
        "image_normalizer": ["stable_diffusion", kind],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
