"""Single components of diffusers and transformers: a config.json and a weight file, both ways."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from latent_diffusion.convert import autoencoder, dit, unet, unet_diffusers
from latent_diffusion.convert.bundle import Bundle, input_widths, read_part
from latent_diffusion.convert.encoders import ENCODERS, read_encoder
from latent_diffusion.convert.inputs import conditioners_for, table_of
from latent_diffusion.convert.tables import write_tensors
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import find_weights, open_tensors, write_safetensors
from latent_diffusion.types import lookup

Json = dict[str, Any]
Progress = Callable[[int], Any]

VERSION = "0.30.0"  # of diffusers, whose names of settings these are
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
IMAGE_ENCODER = "CLIPVisionModelWithProjection"
_TABLE = "class_embedding.weight"  # of noise levels or classes, by number
_PREFIX = "text_model."  # of the names of CLIP's text encoder, in most files


def load_json(path: Path) -> Json:
    """Read a JSON object; ValueError names the file where it can't be read or isn't an object."""
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
    """Return the weight file in a component's folder, and its tensors."""
    weights = find_weights(path, STEMS, variant)
    if weights is None:
        of_variant = f" of variant {variant!r}" if variant else ""
        raise ValueError(f"{path} holds no weights{of_variant} ({' or '.join(STEMS)} …)")
    return weights, open_tensors(weights).tensors


def read_component(path: Path, variant: str | None) -> Bundle:
    """Read the folder of one component. Raises ValueError with the reason for refusing it."""
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
    # Old files have no scaling_factor: it is 0.18215 in Stable Diffusion and 1 in the VQ models.
    usual_scale = 1.0 if config["_class_name"] == "VQModel" else 0.18215
    size = config.get("sample_size")
    return Bundle(
        autoencoder=read_part(where, fields, table, tree, autoencoder.with_new_names(tensors)),
        scale_factor=config.get("scaling_factor", usual_scale),
        shift=config.get("shift_factor") or 0.0,
        image_size=size if isinstance(size, int) else 256,
        notes={"autoencoder": config},
    )


def _read_unet(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = unet_diffusers.fields_from_diffusers(config)
    linear, tensors = bool(config.get("use_linear_projection", False)), dict(tensors)
    in_channels, out_channels = config["in_channels"], config["out_channels"]
    conditioners = {}
    if config.get("num_class_embeds") and _TABLE in tensors:
        conditioners = conditioners_for(in_channels, out_channels, True, tensors.pop(_TABLE))
    vector = config.get("projection_class_embeddings_input_dim")
    tree = unet.shapes(fields, in_channels, config.get("cross_attention_dim"), vector)
    part = read_part(where, fields, unet.diffusers_table(fields, linear), tree, tensors)
    notes = {"linear_projections": linear, "unet": config}
    return Bundle(unet=part, conditioners=conditioners, notes=notes)


def _read_encoder(name: str, where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    part, notes = read_encoder(name, where, tensors, config), Json({name: config})
    if name == "clip_text":
        has_prefix = any(tensor.startswith(_PREFIX) for tensor in tensors)
        notes["clip_text_prefix"] = _PREFIX if has_prefix else ""
    return Bundle(conditioners={name: part}, notes=notes)


COMPONENTS: dict[str, Callable[[Path, Json, Mapping[str, Tensor]], Bundle]] = {
    "AutoencoderKL": _read_autoencoder,
    "VQModel": _read_autoencoder,
    "DiTTransformer2DModel": dit.read_component,
    "Transformer2DModel": dit.read_component,  # its name in older folders
    "UNet2DModel": _read_unet,
    "UNet2DConditionModel": _read_unet,
    "LDMBertModel": partial(_read_encoder, "text"),
    "CLIPTextModel": partial(_read_encoder, "clip_text"),
    IMAGE_ENCODER: partial(_read_encoder, "clip_image"),
}


# --------------------------------------------------------------------------------------- writing


def as_component(bundle: Bundle, name: str) -> tuple[Json, dict[str, Tensor], str]:
    """Return config.json, tensors (still unread) and file stem of one of a bundle's parts."""
    write = {"autoencoder": _write_autoencoder, "unet": _write_unet, "dit": dit.as_component}
    half = write.get(name)
    config, tensors = half(bundle) if half is not None else _write_encoder(bundle, name)
    config |= bundle.notes.get(name, {})  # the settings of the file from which it was read
    if "architectures" in config:
        config.pop("_class_name", None)
    else:
        config.setdefault("_diffusers_version", VERSION)
    return config, tensors, STEMS[half is None]


def write_component(bundle: Bundle, name: str, path: Path, progress: Progress) -> Json:
    """Write the folder of one of a bundle's parts; returns its config."""
    config, tensors, stem = as_component(bundle, name)
    save_json(path / "config.json", config)
    write_safetensors(path / f"{stem}.safetensors", tensors, progress=progress)
    return config


def _write_autoencoder(bundle: Bundle) -> tuple[Json, dict[str, Tensor]]:
    assert bundle.autoencoder is not None
    fields = bundle.autoencoder.fields
    config = autoencoder.diffusers_from_fields(fields, bundle.image_size)
    config["scaling_factor"] = float(bundle.scale_factor)
    return config, write_tensors(autoencoder.diffusers_table(fields), bundle.autoencoder.params)


def _write_unet(bundle: Bundle) -> tuple[Json, dict[str, Tensor]]:
    assert bundle.unet is not None
    fields, linear = bundle.unet.fields, bundle.linear_projections
    widths, side = input_widths(bundle.unet), bundle.latent_size
    config = unet_diffusers.diffusers_from_fields(fields, widths, linear, side)
    tensors = write_tensors(unet.diffusers_table(fields, linear), bundle.unet.params)
    if (table := table_of(bundle.conditioners)) is not None:
        tensors[_TABLE], config["num_class_embeds"] = table, table.shape[0]
    return config, tensors


def _write_encoder(bundle: Bundle, name: str) -> tuple[Json, dict[str, Tensor]]:
    encoder, part = ENCODERS.get(name), bundle.conditioners[name]
    if encoder is None or encoder.write is None:
        raise ValueError(f"diffusers has no component for the conditioner {name}; save it as orbax")
    prefix = bundle.notes.get("clip_text_prefix", _PREFIX) if name == "clip_text" else ""
    tensors = {prefix + tensor: t for tensor, t in encoder.write(part).items()}
    return encoder.module.config_from_fields(part.fields), tensors
