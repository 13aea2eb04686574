"""Read and write diffusers' pipelines; `components` reads and writes their components.

A pipeline has a folder for each component, and a model_index.json that names their classes.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_diffusion.convert import clip_image, dit, scheduler, sd3, sdxl, tokenizers
from latent_diffusion.convert.bundle import (
    Bundle,
    Part,
    input_widths,
    same_noise,
    with_folded_scale,
)
from latent_diffusion.convert.components import (
    CLIP_TEXTS,
    COMPONENTS,
    IMAGE_ENCODER,
    STEMS,
    VERSION,
    Json,
    Progress,
    as_component,
    open_weights,
    read_component,
    read_size,
    read_text_encoder,
    save_json,
    write_folder,
)
from latent_diffusion.convert.inputs import check_inputs, conditioners_for, table_of
from latent_diffusion.convert.settings import Settings
from latent_diffusion.convert.tables import read_tensors, write_tensors
from latent_diffusion.core.types import lookup
from latent_diffusion.data.tokenizers import of_encoder
from latent_diffusion.files.reading import read_json
from latent_diffusion.files.tensors import find_weights
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.process.options import OPTIONS

log = logging.getLogger(__name__)

LCM = "LatentConsistencyModelPipeline"
UPSCALE, UNCLIP = "StableDiffusionUpscalePipeline", "StableUnCLIPImg2ImgPipeline"
DIT = "DiTPipeline"
# Default guidance scales of pipelines; other pipelines of Stable Diffusion have 7.5, the rest 1.
_GUIDANCE = {UPSCALE: 9.0, UNCLIP: 10.0, DIT: 4.0, LCM: 8.5, sdxl.BASE: 5.0, sdxl.REFINER: 5.0}
_GUIDANCE |= dict.fromkeys((sd3.BASE, sd3.IMG2IMG), sd3.GUIDANCE)
# Components without weights, and those that are read with the component that they serve.
_BESIDE_WEIGHTS = (
    "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "low_res_scheduler",
    "image_noising_scheduler", "image_normalizer",
)  # fmt: skip
# Components that judge or prepare pictures, or that `load_adapter` reads.
_LEFT_OUT = (
    "safety_checker", "feature_extractor", "image_encoder", "image_processor", "depth_estimator",
    "controlnet", "adapter", "watermarker",
)  # fmt: skip
_INDEX_SETTINGS = (  # the last one belongs to the safety checker
    "id2label", "max_noise_level", "force_zeros_for_empty_prompt", "requires_aesthetics_score",
    "requires_safety_checker",
)  # fmt: skip
_COSINE = "squaredcos_cap_v2"
_NOISING = Settings(  # of the schedulers that noise a condition
    defaults={
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
    },
    checked={
        "_class_name": ("DDPMScheduler", "DDIMScheduler"),
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False, None),
    },
    harmless=scheduler.KNOWN,
)
_LOW_RES = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline or a component of diffusers."""
    if (path / "model_index.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    config = read_json(path / "config.json")
    return "_class_name" in config or "architectures" in config


def read_diffusers(path: Path, variant: str | None = None) -> Bundle:
    """Read the folder of a pipeline or a component. Raises ValueError where it can't be read.

    variant: read the "fp16" or "non_ema" files. Components that only judge or prepare pictures (a
    safety checker, a depth estimator …) are left out, with a warning; other components of unknown
    classes are refused.
    """
    if not (path / "model_index.json").is_file():
        return _assumed(read_component(path, variant))
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"can't read {path / 'model_index.json'}: it names no _class_name")
    labels = {"id2label": index["id2label"]} if name == DIT and "id2label" in index else {}
    bundle = Bundle(notes={"pipeline": name, **labels})
    if variant:  # some of the parts may lack it, but not all
        if not any(find_weights(folder, STEMS, variant) for folder in path.iterdir()):
            raise ValueError(f"{path}: none of its folders holds weights of variant {variant!r}")
        variant = f"{variant}?"
    for component, kind in _components(path, index).items():
        if sdxl.is_sdxl(name) and component in sdxl.FOLDERS:
            bundle = _merge(bundle, _read_sdxl_encoder(path / component, variant, index))
        elif sd3.is_sd3(name) and component in sd3.FOLDERS:
            bundle = _merge(bundle, _read_sd3_encoder(path / component, variant))
        # In other pipelines an image encoder is only for adapters, which are not read here.
        elif kind in COMPONENTS and (kind != IMAGE_ENCODER or name == UNCLIP):
            bundle = _merge(bundle, read_component(path / component, variant))
        elif component not in (*_BESIDE_WEIGHTS, *_LEFT_OUT):
            lookup(COMPONENTS, kind, f"class of {component} in {path}")
        elif component not in _BESIDE_WEIGHTS:
            log.warning("%s: its %s (%s) is left out", path, component, kind)
    bundle = _with_inputs(bundle, path, index, variant)
    if bundle.mmdit is not None:
        bundle = sd3.with_encoders(bundle, path)
    notes = {**bundle.notes, "conditioners": sorted(bundle.conditioners)}
    bundle = replace(bundle, notes=notes)
    named = _components(path, index).get("scheduler")
    if named is not None or (path / "scheduler").is_dir():
        config = read_json(path / "scheduler" / "scheduler_config.json")
        bundle = _with_scheduler(bundle, config, named)
    else:
        bundle = _assumed(bundle)
        if bundle.denoiser is not None:
            prediction = bundle.diffusion["prediction"]
            log.warning("%s: no scheduler; taken for a model that predicts %s", path, prediction)
    if (path / "tokenizer").is_dir() and bundle.conditioners.keys() & {"text", "clip_text"}:
        bundle = tokenizers.with_tokenizer(bundle, path / "tokenizer")
    if (path / "tokenizer_2").is_dir() and "clip_text_2" in bundle.conditioners:
        bundle = tokenizers.with_second(bundle, path / "tokenizer_2")
    side = read_size(bundle.notes.get("unet", {}))
    for transformer in (bundle.dit, bundle.mmdit):
        side = side if transformer is None else transformer.fields["base_size"]
    return bundle if side is None else replace(bundle, image_size=bundle.in_pixels(side))


def _components(path: Path, index: Json) -> dict[str, str]:
    """The classes of the components that are present, by folder; ValueError for unknown entries."""
    classes = {}
    for name, entry in index.items():
        if name.startswith("_") or name in _INDEX_SETTINGS or entry in (None, False):
            continue
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"{path}: its index says {name}={str(entry)[:80]}, which is unknown")
        if entry[1] is None:
            continue
        if Path(name).name != name or not isinstance(entry[1], str):
            raise ValueError(f"{path}: its index names a component {name!r} of class {entry[1]!r}")
        classes[name] = entry[1]
    return classes


def _with_inputs(bundle: Bundle, path: Path, index: Json, variant: str | None) -> Bundle:
    """The bundle with conditioners for the inputs that its U-Net has beside the latent."""
    unet = bundle.unet
    if unet is None:
        return bundle
    conditioners = dict(bundle.conditioners)
    if "low_res" in conditioners:
        conditioners["low_res"] = _low_res_noised(conditioners["low_res"], path, index)
    elif "clip_image" in conditioners:
        part = _image_noised(conditioners["clip_image"], path, index, variant)
        conditioners["clip_image"] = part
    elif bundle.time_width is not None and sdxl.is_sdxl(bundle.notes["pipeline"]):
        channels = input_widths(unet)[0], unet.fields["out_channels"]
        conditioners |= conditioners_for(*channels, text=True)
        bundle = replace(bundle, conditioners=conditioners)
        return sdxl.with_sizes(bundle, path, bool(index.get("requires_aesthetics_score")))
    elif "class_label" not in conditioners:
        in_channels, context, vector = input_widths(unet)
        if context is not None and not conditioners:
            raise ValueError(f"{path}: nothing in it makes the U-Net's context of width {context}")
        if vector is not None:
            raise ValueError(f"{path}: nothing in it makes the U-Net's vector of {vector} numbers")
        out_channels = unet.fields["out_channels"]
        conditioners |= conditioners_for(in_channels, out_channels, bool(conditioners))
    return replace(bundle, conditioners=conditioners)


def _read_sdxl_encoder(path: Path, variant: str | None, index: Json) -> Bundle:
    name, config = sdxl.FOLDERS[path.name], read_json(path / "config.json")
    zeros = index.get("force_zeros_for_empty_prompt", True)
    chosen = sdxl.text_fields(name, config.get("projection_dim", 512), bool(zeros))
    return read_text_encoder(name, path, variant, chosen)


def _read_sd3_encoder(path: Path, variant: str | None) -> Bundle:
    name, config = sd3.FOLDERS[path.name], read_json(path / "config.json")
    chosen = sd3.text_fields(name, config.get("projection_dim", 512))
    return read_text_encoder(name, path, variant, chosen)


def _low_res_noised(part: Part, path: Path, index: Json) -> Part:
    """The conditioner of the upscaler's small picture, with the noise that its pipeline adds."""
    name, levels = "low_res_scheduler", part.fields["num_levels"]
    config = {**_LOW_RES, "num_train_timesteps": levels}
    if (path / name).is_dir() or name in _components(path, index):
        config = _noising(path, index, name, "scaled_linear")
    if (number := config["num_train_timesteps"]) != levels:
        raise ValueError(f"{name}.num_train_timesteps={number}; the U-Net has {levels} levels")
    ends = {name: config[name] for name in ("beta_start", "beta_end")}
    level = {"max_noise_level": index.get("max_noise_level", 350)}
    return Part({**part.fields, **level, **ends}, part.params)


def _image_noised(part: Part, path: Path, index: Json, variant: str | None) -> Part:
    """The conditioner of unCLIP's picture, with the statistics that standardise its embedding."""
    config = _noising(path, index, "image_noising_scheduler", _COSINE)
    weights, tensors = open_weights(path / "image_normalizer", variant)
    shapes = dict.fromkeys(clip_image.STATISTICS, (part.fields["projection_dim"],))
    statistics = read_tensors(clip_image.statistics_table(), shapes, tensors, str(weights))
    fields = {**part.fields, "num_levels": config["num_train_timesteps"]}
    return Part(fields, {**part.params, **statistics}, part.unused)


def _noising(path: Path, index: Json, name: str, curve: str) -> Json:
    """The settings of a scheduler that noises a condition. curve: the only `beta_schedule`."""
    config = read_json(path / name / "scheduler_config.json")
    if (kind := _components(path, index).get(name)) is not None:
        config["_class_name"] = kind
    settings = _NOISING.complete(config, name)
    if settings["beta_schedule"] != curve:
        raise ValueError(
            f"{name}.beta_schedule={settings['beta_schedule']!r}; supported: {curve!r}"
        )
    return settings


def _assumed(bundle: Bundle) -> Bundle:
    """The bundle with the noise of the released models of its network, if no scheduler says it."""
    if bundle.mmdit is not None:
        diffusion, sampling = scheduler.from_diffusers(sd3.SCHEDULER)
        return replace(bundle, diffusion=diffusion, sampling={**sampling, "num_steps": sd3.STEPS})
    return replace(bundle, diffusion=scheduler.ASSUMED if bundle.dit is None else dit.DIFFUSION)


def _with_scheduler(bundle: Bundle, config: Json, kind: str | None) -> Bundle:
    """The bundle with the schedule and defaults of a scheduler. kind: its class in the index."""
    if kind is not None:
        config = {**config, "_class_name": kind}
    diffusion, sampling = scheduler.from_diffusers(config)
    name = bundle.notes["pipeline"]
    default = _GUIDANCE.get(name, 7.5 if name.startswith("StableDiffusion") else 1.0)
    unet = bundle.unet.fields if bundle.unet else {}
    distilled = sampling.get("sampler") == "lcm" and unet.get("guidance_dim") is None
    # A distilled network without guidance_dim has learnt the guidance.
    sampling["guidance_scale"] = 1.0 if distilled else default
    if sd3.is_sd3(name):
        if diffusion["prediction"] != "flow":  # of a class that isn't known
            given = {key: config[key] for key in sd3.SCHEDULER if key in config}
            given["_class_name"] = sd3.SCHEDULER["_class_name"]
            diffusion, flow = scheduler.from_diffusers({**sd3.SCHEDULER, **given})
            sampling = {**flow, **sampling}
        sampling["num_steps"] = sd3.STEPS
    notes = {**bundle.notes, "scheduler": config}
    return replace(bundle, diffusion=diffusion, sampling=sampling, notes=notes)


def _merge(whole: Bundle, part: Bundle) -> Bundle:
    for name, component in part.parts():
        whole = whole.with_part(name, component)
    if part.autoencoder is not None:
        scale, shift, size = part.scale_factor, part.shift, part.image_size
        whole = replace(whole, scale_factor=scale, shift=shift, image_size=size)
    return replace(whole, notes={**whole.notes, **part.notes})


# --------------------------------------------------------------------------------------- writing

PIPELINES = {  # by the conditioners
    (): "LDMPipeline",
    ("low_res",): "LDMSuperResolutionPipeline",
    ("text",): "LDMTextToImagePipeline",
    ("clip_text",): "StableDiffusionPipeline",
    ("clip_text", "masked_image"): "StableDiffusionInpaintPipeline",
    ("clip_text", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("clip_text", "low_res"): UPSCALE,
    ("clip_image", "clip_text"): UNCLIP,
    ("clip_text", "clip_text_2", "sizes"): sdxl.BASE,
    ("clip_text", "clip_text_2", "masked_image", "sizes"): sdxl.INPAINT,
    ("clip_text_2", "sizes"): sdxl.REFINER,
    ("clip_text", "clip_text_2", "t5_text"): sd3.BASE,
}
_LIBRARIES = {
    "text": "latent_diffusion",
    "clip_text": "transformers",
    "clip_text_2": "transformers",
    "t5_text": "transformers",
    "clip_image": "transformers",
}
_DDPM = {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION}
_LENGTH = 77  # number of tokens that LDMTextToImagePipeline makes of every prompt
# Arguments of pipelines for which our models have no component.
_ABSENT = {
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    LCM: ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionImg2ImgPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    UPSCALE: ("safety_checker", "feature_extractor", "watermarker"),
    **dict.fromkeys(
        (sdxl.BASE, sdxl.REFINER, sdxl.INPAINT, sd3.BASE, sd3.IMG2IMG),
        ("image_encoder", "feature_extractor"),
    ),
}


def write_diffusers(bundle: Bundle, path: Path, progress: Progress = lambda count: None) -> None:
    """Write a folder that diffusers loads: a pipeline, or the only component of the model.

    A latent scale per channel moves into the autoencoder (`with_folded_scale`). A word tokenizer is
    written for the tokenizers library. Raises ValueError where no pipeline runs the model.
    """
    if bundle.prior is not None:
        raise ValueError("diffusers has no pipeline with a prior over codes; save it as orbax")
    if bundle.autoencoder is not None and bundle.autoencoder.fields["regularization"] == "identity":
        raise ValueError("diffusers has no pipeline here for models of pixels; save it as orbax")
    bundle = with_folded_scale(bundle, shifts=True)
    table = table_of(bundle.conditioners)
    parts = [name for name, part in bundle.parts() if part.params]
    if table is not None:  # it belongs to the U-Net in diffusers
        parts = [name for name in parts if name not in ("low_res", "class_label")]
    if not parts:
        raise ValueError("there is nothing to save: the model is empty")
    if len(parts) == 1:
        assumed = _assumed(bundle).diffusion
        if bundle.denoiser is not None and not same_noise(bundle.diffusion, assumed):
            said = ", ".join(f"{name}={value}" for name, value in assumed.items())
            log.warning("%s: a network alone doesn't say its noise; load takes %s", path, said)
        write_folder(path, *as_component(bundle, parts[0]), progress)
        return
    pipeline = _pipeline(bundle)
    check_inputs(bundle)
    _check_texts(bundle, pipeline)
    tokenizers.check_words(bundle.tokenizer)
    components = {name: as_component(bundle, name) for name in parts}
    settings = bundle.notes.get("scheduler")
    of_pipeline = {"guidance_scale", "num_steps"}  # settings that no scheduler has
    bundle = replace(bundle, notes={**bundle.notes, "pipeline": pipeline})
    unsaid = {} if settings is None else _unsaid(settings, bundle)
    if settings is None or not unsaid.keys() <= of_pipeline:
        settings = scheduler.to_diffusers(bundle.diffusion, bundle.sampling)
        unsaid = _unsaid(settings, bundle)
    if unsaid:
        kinds, said = f"{pipeline} with {settings['_class_name']}", ", ".join(unsaid.values())
        log.warning("%s: a %s doesn't say all of the model: %s", path, kinds, said)
    # From here on only numbers beyond the range of a dtype are refused, so that a folder hardly
    # ever has parts of two models.
    index: Json = {"_class_name": pipeline, "_diffusers_version": VERSION}
    names = _folders(pipeline)
    for name, (config, tensors, stem) in components.items():
        write_folder(path / names[name], config, tensors, stem, progress)
        kind = config.get("_class_name") or config["architectures"][0]
        index[names[name]] = [_LIBRARIES.get(name, "diffusers"), kind]
    save_json(path / "scheduler" / "scheduler_config.json", settings)
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    if bundle.tokenizer is not None and bundle.conditioners.keys() & {"text", "clip_text"}:
        tokenizer = of_encoder(bundle.tokenizer, "clip_text")
        kind = tokenizers.write_tokenizer(tokenizer, path / "tokenizer")
        index["tokenizer"] = ["transformers", kind]
    elif bundle.conditioners.keys() & {"text", "clip_text"}:
        index["tokenizer"] = [None, None]
    if bundle.mmdit is not None:
        index |= _write_sd3(bundle, path)
    elif "clip_text_2" in bundle.conditioners:
        index |= _write_sdxl(bundle, path, index)
    if pipeline == UPSCALE:
        index |= _write_low_res(bundle.conditioners["low_res"].fields, path)
    if pipeline == UNCLIP:
        index |= _write_image_noising(bundle.conditioners["clip_image"], path)
    if "id2label" in bundle.notes:  # the names of DiT's classes
        index["id2label"] = bundle.notes["id2label"]
    index |= {name: [None, None] for name in _ABSENT.get(pipeline, ())}
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    save_json(path / "model_index.json", index)


def _unsaid(settings: Json, bundle: Bundle) -> dict[str, str]:
    """What a pipeline with a scheduler's settings wouldn't say of a model, by name.

    That is the noise ("diffusion"), or sampling defaults: "name=value" and what is read instead.
    """
    said = _with_scheduler(bundle, settings, None)
    unsaid = {} if same_noise(bundle.diffusion, said.diffusion) else {"diffusion": "its noise"}
    for name in sorted({*bundle.sampling, *said.sampling}):
        usual = OPTIONS[name].default if name in OPTIONS else None
        ours, read = (
            usual if of.get(name) is None else of[name] for of in (bundle.sampling, said.sampling)
        )
        if ours != read:
            unsaid[name] = f"{name}={ours} is read as {read}"
    return unsaid


def _pipeline(bundle: Bundle) -> str:
    """The class that runs the model: the one it was read from, or that for its conditioners."""
    conditioners = tuple(sorted(bundle.conditioners))
    if list(conditioners) == bundle.notes.get("conditioners"):
        return bundle.notes["pipeline"]
    if bundle.dit is not None and conditioners == ("class_label",):
        return DIT
    if bundle.unet is not None and bundle.unet.fields.get("guidance_dim") is not None:
        if conditioners != ("clip_text",):
            raise ValueError(
                f"diffusers' {LCM}, for guidance as an input (guidance_dim), is conditioned by "
                f"clip_text alone, not by {' + '.join(conditioners)}; save it as orbax"
            )
        return LCM
    of_mmdit = PIPELINES.get(conditioners) == sd3.BASE
    has_pipeline = conditioners in PIPELINES and of_mmdit == (bundle.mmdit is not None)
    if bundle.dit is not None or not has_pipeline:
        names = ", ".join(" + ".join(parts) or "nothing" for parts in PIPELINES)
        raise ValueError(
            f"diffusers has no pipeline for models conditioned by {' + '.join(conditioners)}, only "
            f"by {names}; save it as orbax"
        )
    if conditioners == ("text",) and bundle.conditioners["text"].fields["max_length"] != _LENGTH:
        return PIPELINES["clip_text",]  # this pipeline takes the length from the tokenizer
    return PIPELINES[conditioners]


def _check_texts(bundle: Bundle, pipeline: str) -> None:
    """Raise ValueError for a text encoder of CLIP that the pipeline uses in another way."""
    parts = bundle.conditioners.items()
    encoders = {name: ClipText(**part.fields) for name, part in parts if name in CLIP_TEXTS}
    for name, module in encoders.items():
        usual: Json = {"final_norm": True, "projection_dim": None, "zero_null": False}
        if sdxl.is_sdxl(pipeline):
            zero_null = encoders["clip_text_2"].zero_null
            usual = sdxl.text_fields(name, module.projection_dim, zero_null)
        elif sd3.is_sd3(pipeline):
            usual = {"zero_null": False, **sd3.text_fields(name, module.projection_dim)}
        usual.pop("pad_id", None)  # which is that of the tokenizer
        for field, value in usual.items():
            if (ours := getattr(module, field)) != value:
                raise ValueError(
                    f"diffusers' {pipeline} has {name}.{field}={value}, this model {ours}; save it "
                    "as orbax"
                )


def _folders(pipeline: str) -> dict[str, str]:
    if pipeline.startswith("LDM"):
        return {"autoencoder": "vqvae", "unet": "unet", "text": "bert"}
    encoders = {"clip_text": "text_encoder", "text": "text_encoder", "clip_image": "image_encoder"}
    encoders["clip_text_2"] = "text_encoder_2"
    encoders["t5_text"] = "text_encoder_3"
    networks = {"unet": "unet", "dit": "transformer", "mmdit": "transformer"}
    return {"autoencoder": "vae", **networks, **encoders}


def _write_sd3(bundle: Bundle, path: Path) -> Json:
    """Write the tokenizers of the second and third encoders; returns their index entries."""
    entries: Json = {f"tokenizer_{i}": [None, None] for i in (2, 3)}
    clip = of_encoder(bundle.tokenizer, "clip_text_2")
    if clip is not None:
        padded = tokenizers.padded(clip, bundle.conditioners["clip_text_2"].fields["pad_id"])
        kind = tokenizers.write_tokenizer(padded, path / "tokenizer_2")
        entries["tokenizer_2"] = ["transformers", kind]
    if not tokenizers.has_t5(bundle):
        entries["text_encoder_3"] = [None, None]
    elif clip is not None:
        t5 = of_encoder(bundle.tokenizer, "t5_text")
        kind = tokenizers.write_tokenizer(t5, path / "tokenizer_3")
        entries["tokenizer_3"] = ["transformers", kind]
    return entries


def _write_sdxl(bundle: Bundle, path: Path, index: Json) -> Json:
    """Write the tokenizer of the second text encoder; returns entries for the index."""
    second, sizes = bundle.conditioners["clip_text_2"], bundle.conditioners["sizes"]
    entries: Json = {"force_zeros_for_empty_prompt": bool(second.fields.get("zero_null"))}
    if index["_class_name"] != sdxl.BASE:
        entries["requires_aesthetics_score"] = bool(sizes.fields.get("aesthetic_score"))
    entries["tokenizer_2"] = [None, None]
    if bundle.tokenizer is not None:
        padded = tokenizers.padded(bundle.tokenizer, second.fields["pad_id"])
        kind = tokenizers.write_tokenizer(padded, path / "tokenizer_2")
        entries["tokenizer_2"] = ["transformers", kind]
    if "clip_text" not in bundle.conditioners:
        entries |= {name: [None, None] for name in ("text_encoder", "tokenizer")}
    return entries


def _write_low_res(fields: Mapping[str, Any], path: Path) -> Json:
    """Write the schedule that noises the small picture; returns its index entries."""
    ends = {name: fields[name] for name in ("beta_start", "beta_end") if name in fields}
    config = {"num_train_timesteps": fields["num_levels"], **_LOW_RES, **ends, **_DDPM}
    save_json(path / "low_res_scheduler" / "scheduler_config.json", config)
    return {
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "max_noise_level": fields.get("max_noise_level", 350),
    }


def _write_image_noising(part: Part, path: Path) -> Json:
    """Write the components around unCLIP's image encoder; returns their index entries."""
    fields = part.fields
    statistics = {name: part.params[name] for name in clip_image.STATISTICS}
    tensors = write_tensors(clip_image.statistics_table(), statistics)
    kind = "StableUnCLIPImageNormalizer"
    config = {**_DDPM, "_class_name": kind, "embedding_dim": fields["projection_dim"]}
    write_folder(path / "image_normalizer", config, tensors)
    schedule = {**_DDPM, "num_train_timesteps": fields["num_levels"], "beta_schedule": _COSINE}
    save_json(path / "image_noising_scheduler" / "scheduler_config.json", schedule)
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
