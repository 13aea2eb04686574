"""diffusers' and transformers' single components: a config.json and a weight file, both ways."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latent_diffusion.convert import autoencoder, clip_image, clip_text, text, unet, unet_diffusers
from latent_diffusion.convert.bundle import Bundle, input_widths, read_part
from latent_diffusion.convert.inputs import conditioners_for, table_of
from latent_diffusion.convert.tables import below, matching, write_tensors
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import find_weights, open_tensors, write_safetensors
from latent_diffusion.types import lookup

Json = dict[str, Any]
Progress = Callable[[int], Any]

VERSION = "0.30.0"  # of diffusers, whose names for settings these are
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
IMAGE_ENCODER = "CLIPVisionModelWithProjection"
_TABLE = "class_embedding.weight"  # of noise levels or classes, by number


def load_json(path: Path) -> Json:
    """A JSON object; ValueError where it isn't one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"can't read {path}: not a JSON object")
    return content


def save_json(path: Path, content: Json) -> None:
    """Write a JSON object as diffusers does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_weights(path: Path, variant: str | None) -> tuple[Path, dict[str, Tensor]]:
    """The weight file in a component's folder, and its tensors."""
    weights = find_weights(path, STEMS, variant)
    if weights is None:
        named = f" of variant {variant!r}" if variant else ""
        raise ValueError(f"{path} holds no weights{named} ({' or '.join(STEMS)} …)")
    return weights, open_tensors(weights).tensors


def read_component(path: Path, variant: str | None) -> Bundle:
    """The bundle of one component's folder. Raises ValueError with the reason for refusing it."""
    config = load_json(path / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or ["nothing"])[0]
    read = lookup(COMPONENTS, name, f"component in {path}")
    weights, tensors = open_weights(path, variant)
    try:
        return read(weights, {**config, "_class_name": name}, tensors)
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'} does not say {error}") from error
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{path / 'config.json'} does not describe a {name}: {error}") from error


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
    fields = unet_diffusers.fields_from_diffusers(config)
    linear, own = bool(config.get("use_linear_projection", False)), dict(tensors)
    in_channels, out_channels = config["in_channels"], config["out_channels"]
    conditioners = {}
    if config.get("num_class_embeds") and _TABLE in own:
        conditioners = conditioners_for(in_channels, out_channels, True, own.pop(_TABLE))
    vector = config.get("projection_class_embeddings_input_dim")
    tree = unet.shapes(fields, in_channels, config.get("cross_attention_dim"), vector)
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


def _read_clip_image(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = clip_image.fields_from_config(config)
    table, tree = clip_image.transformers_table(fields), clip_image.shapes(fields)
    part = read_part(where, fields, table, tree, tensors, clip_image.unused(fields))
    return Bundle(conditioners={"clip_image": part}, notes={"clip_image": config})


COMPONENTS: dict[str, Callable[[Path, Json, Mapping[str, Tensor]], Bundle]] = {
    "AutoencoderKL": _read_autoencoder,
    "VQModel": _read_autoencoder,
    "UNet2DModel": _read_unet,
    "UNet2DConditionModel": _read_unet,
    "LDMBertModel": _read_bert,
    "CLIPTextModel": _read_clip,
    IMAGE_ENCODER: _read_clip_image,
}


# --------------------------------------------------------------------------------------- writing


def as_component(bundle: Bundle, name: str) -> "Written":
    """config.json, tensors (still unread) and file stem of one of a bundle's parts."""
    config, tensors, stem = lookup(_WRITERS, name, "part in a folder of diffusers")(bundle)
    config = {**config, **bundle.notes.get(name, {})}  # what it said when it was read
    if "architectures" not in config:
        config.setdefault("_diffusers_version", VERSION)
    else:
        config.pop("_class_name", None)
    return config, tensors, stem


def write_component(bundle: Bundle, name: str, path: Path, progress: Progress) -> Json:
    """Write the folder of one of a bundle's parts; returns its config."""
    config, tensors, stem = as_component(bundle, name)
    save_json(path / "config.json", config)
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
    side = bundle.image_size // bundle.downsampling
    config = unet_diffusers.diffusers_from_fields(fields, input_widths(bundle.unet), linear, side)
    tensors = write_tensors(unet.diffusers_table(fields, linear), bundle.unet.params)
    if (table := table_of(bundle.conditioners)) is not None:
        tensors[_TABLE], config["num_class_embeds"] = table, table.shape[0]
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


def _write_clip_image(bundle: Bundle) -> Written:
    part = bundle.conditioners["clip_image"]
    own = {k: t for k, t in part.params.items() if k not in clip_image.STATISTICS}
    tensors = write_tensors(clip_image.transformers_table(part.fields), own)
    tensors |= matching(clip_image.unused(part.fields), part.unused)
    return clip_image.config_from_fields(part.fields), tensors, "model"


_WRITERS: dict[str, Callable[[Bundle], Written]] = {
    "autoencoder": _write_autoencoder,
    "unet": _write_unet,
    "text": _write_text,
    "clip_text": _write_clip,
    "clip_image": _write_clip_image,
}
