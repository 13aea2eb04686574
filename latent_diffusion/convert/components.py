"""Read and write single components of diffusers and transformers: a config.json and weights."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from latent_diffusion.convert import (
    autoencoder,
    autoencoder_diffusers,
    autoencoder_tiny,
    dit,
    mmdit,
    t5,
    unet,
    unet_diffusers,
)
from latent_diffusion.convert.bundle import Bundle, Size, check_depth, input_widths, read_part
from latent_diffusion.convert.clip_text import PROJECTION
from latent_diffusion.convert.encoders import ENCODERS, read_encoder
from latent_diffusion.convert.inputs import conditioners_for, table_of
from latent_diffusion.convert.settings import Fields, decimal, remembered
from latent_diffusion.convert.tables import write_tensors
from latent_diffusion.core.types import lookup
from latent_diffusion.files.reading import read_json, reading
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import find_weights, open_tensors, write_safetensors

log = logging.getLogger(__name__)

Json = dict[str, Any]
Progress = Callable[[int], Any]

VERSION = "0.30.0"  # the version of diffusers that the written settings are for
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
CLIP_TEXTS = ("clip_text", "clip_text_2")
IMAGE_ENCODER = "CLIPVisionModelWithProjection"
_TABLE = "class_embedding.weight"  # embeddings of noise levels or of classes
_PREFIX = "text_model."  # prefix of the names of CLIP's text encoder, in most files


def save_json(path: Path, content: Json) -> None:
    """Write a JSON object as diffusers does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_weights(path: Path, variant: str | None) -> tuple[Path, dict[str, Tensor]]:
    """Return the weight file in a component's folder, and its tensors.

    variant: such as "fp16"; "fp16?" falls back to the usual file where there is no such file.
    """
    weights = find_weights(path, STEMS, variant and variant.removesuffix("?"))
    if weights is None and variant and variant.endswith("?"):
        weights = find_weights(path, STEMS)
        log.warning("%s: no weights of variant %s; the usual ones are read", path, variant[:-1])
    if weights is None:
        of_variant = f" of variant {variant!r}" if variant else ""
        raise ValueError(f"{path} holds no weights{of_variant} ({' or '.join(STEMS)} …)")
    return weights, open_tensors(weights).tensors


def read_component(path: Path, variant: str | None) -> Bundle:
    """Read the folder of one component. Raises ValueError with the reason if it can't be read."""
    config = read_json(path / "config.json")
    with reading(path):
        name = config.get("_class_name") or (config.get("architectures") or ["nothing"])[0]
        if name in ("ControlNetModel", "MultiAdapter", "T2IAdapter"):
            raise ValueError(f"{path}: a {name} is no model: give it to load_adapter")
        read = lookup(COMPONENTS, name, f"component in {path}")
    weights, tensors = open_weights(path, variant)
    with reading(path):
        return read(weights, {**config, "_class_name": name}, tensors)


def read_size(config: Mapping[str, Any]) -> Size | None:
    """`sample_size`: the side of a training picture or latent, or (height, width)."""
    size = config.get("sample_size")
    sides: list[Any] = [size] if not isinstance(size, list | tuple) else list(size)
    if size is None:
        return None
    if len(sides) not in (1, 2) or not all(
        type(side) is int and 0 < side < 1 << 20 for side in sides
    ):
        raise ValueError(f"{config['_class_name']}.sample_size={size!r}; expected one or two sides")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def _read_autoencoder(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = autoencoder_diffusers.fields_from_diffusers(config)
    values = autoencoder_diffusers.complete(config)
    tensors = autoencoder_diffusers.with_new_names(tensors)
    tensors = {**tensors, **autoencoder_diffusers.without_quant_convs(values, fields)}
    check_depth(where, fields, tensors)
    table, tree = autoencoder.diffusers_table(fields), autoencoder.shapes(fields)
    return Bundle(
        autoencoder=read_part(where, fields, table, tree, tensors),
        scale_factor=values["scaling_factor"],
        shift=values.get("shift_factor") or 0.0,
        image_size=read_size(config) or 256,
        notes={"autoencoder": config},
    )


def _read_unet(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields, values = unet_diffusers.fields_from_diffusers(config), unet_diffusers.complete(config)
    linear, tensors = bool(values.get("use_linear_projection")), dict(tensors)
    in_channels, out_channels = values["in_channels"], values["out_channels"]
    conditioners = {}
    if values["num_class_embeds"] and not fields["vector_projection"]:
        if _TABLE not in tensors:
            raise ValueError(f"{where}: num_class_embeds needs a tensor {_TABLE}")
        conditioners = conditioners_for(in_channels, out_channels, True, tensors.pop(_TABLE))
    check_depth(where, fields, tensors)
    widths = unet_diffusers.input_widths(values)
    text_time = unet_diffusers.is_text_time(values)
    table = unet.diffusers_table(fields, linear, text_time)
    part = read_part(where, fields, table, unet.shapes(fields, *widths), tensors)
    notes = {"linear_projections": linear, "unet": config}
    if text_time:
        notes["time_width"] = values["addition_time_embed_dim"]
    bundle = Bundle(unet=part, conditioners=conditioners, notes=notes)
    size = read_size(config)
    return bundle if size is None else replace(bundle, image_size=bundle.in_pixels(size))


def read_text_encoder(name: str, path: Path, variant: str | None, chosen: Fields) -> Bundle:
    """Read an encoder's folder as the conditioner `name`. chosen: fields that have priority."""
    config = read_json(path / "config.json")
    weights, tensors = open_weights(path, variant)
    with reading(path):
        return _read_encoder(name, weights, config, tensors, chosen)


def _read_encoder(
    name: str,
    where: Path,
    config: Json,
    tensors: Mapping[str, Tensor],
    chosen: Fields | None = None,
) -> Bundle:
    part, notes = read_encoder(name, where, tensors, config, chosen), Json({name: config})
    if name in CLIP_TEXTS:
        has_prefix = any(tensor.startswith(_PREFIX) for tensor in tensors)
        notes[f"{name}_prefix"] = _PREFIX if has_prefix else ""
    return Bundle(conditioners={name: part}, notes=notes)


COMPONENTS: dict[str, Callable[[Path, Json, Mapping[str, Tensor]], Bundle]] = {
    "AutoencoderKL": _read_autoencoder,
    "VQModel": _read_autoencoder,
    autoencoder_tiny.NAME: autoencoder_tiny.read_component,
    "DiTTransformer2DModel": dit.read_component,
    "Transformer2DModel": dit.read_component,  # the class's name in older folders
    mmdit.NAME: mmdit.read_component,
    "UNet2DModel": _read_unet,
    "UNet2DConditionModel": _read_unet,
    t5.NAME: partial(_read_encoder, "t5_text"),
    "LDMBertModel": partial(_read_encoder, "text"),
    "CLIPTextModel": partial(_read_encoder, "clip_text"),
    "CLIPTextModelWithProjection": partial(_read_encoder, "clip_text"),
    IMAGE_ENCODER: partial(_read_encoder, "clip_image"),
}


# --------------------------------------------------------------------------------------- writing


def _meaning_of_autoencoder(config: Mapping[str, Any]) -> Any:
    if config["_class_name"] == autoencoder_tiny.NAME:
        return autoencoder_tiny.meaning(config)
    values = autoencoder_diffusers.complete(config)
    convs = values.get("use_quant_conv"), values.get("use_post_quant_conv")
    scaling = decimal(values["scaling_factor"]), decimal(values.get("shift_factor") or 0.0)
    fields = autoencoder_diffusers.fields_from_diffusers(config)
    return config["_class_name"], fields, scaling, convs


def _meaning_of_unet(config: Mapping[str, Any]) -> Any:
    values, fields = unet_diffusers.complete(config), unet_diffusers.fields_from_diffusers(config)
    settings = values["num_class_embeds"], values.get("use_linear_projection"), read_size(config)
    sizes = values.get("addition_embed_type"), values.get("addition_time_embed_dim")
    return config["_class_name"], fields, settings, unet_diffusers.input_widths(values), sizes


MEANINGS = {
    "autoencoder": _meaning_of_autoencoder,
    "unet": _meaning_of_unet,
    "dit": dit.complete,
    "mmdit": mmdit.complete,
}


def as_component(bundle: Bundle, name: str) -> tuple[Json, dict[str, Tensor], str]:
    """Return config.json, tensors (not yet read) and file stem of one of a bundle's parts."""
    writer = _WRITERS.get(name)
    config, tensors = writer(bundle) if writer is not None else _write_encoder(bundle, name)
    meaning = MEANINGS.get(name) or ENCODERS[name].module.fields_from_config
    size = {key: config[key] for key in ("sample_size",) if key in config}
    config = remembered(config, bundle.notes.get(name), meaning)
    if name == "autoencoder" and bundle.denoiser is None:  # else the denoiser's config has the size
        config |= size
    if "architectures" in config:
        config.pop("_class_name", None)
    else:
        config.setdefault("_diffusers_version", VERSION)
    return config, tensors, STEMS[writer is None]


def write_folder(
    path: Path,
    config: Json,
    tensors: Mapping[str, Tensor],
    stem: str = STEMS[0],
    progress: Progress = lambda count: None,
) -> None:
    """Write a component's config and weights. stem: the weight file's name without suffix."""
    save_json(path / "config.json", config)
    write_safetensors(path / f"{stem}.safetensors", tensors, progress=progress)


def _write_autoencoder(bundle: Bundle) -> tuple[Json, dict[str, Tensor]]:
    assert bundle.autoencoder is not None
    fields = bundle.autoencoder.fields
    if fields["regularization"] == "tiny":
        return autoencoder_tiny.as_component(bundle)
    config = autoencoder_diffusers.diffusers_from_fields(fields, bundle.image_size)
    config["scaling_factor"] = decimal(bundle.scale_factor)
    if bundle.shift:
        config["shift_factor"] = decimal(bundle.shift)
    tensors = write_tensors(autoencoder.diffusers_table(fields), bundle.autoencoder.params)
    source = bundle.notes.get("autoencoder", {})
    return autoencoder_diffusers.drop_quant_convs(config, tensors, source)


def _write_unet(bundle: Bundle) -> tuple[Json, dict[str, Tensor]]:
    assert bundle.unet is not None
    fields, linear = bundle.unet.fields, bundle.linear_projections
    widths, side, time_width = input_widths(bundle.unet), bundle.latent_size, bundle.time_width
    config = unet_diffusers.diffusers_from_fields(fields, widths, linear, side, time_width)
    names = unet.diffusers_table(fields, linear, time_width is not None)
    tensors = write_tensors(names, bundle.unet.params)
    if (table := table_of(bundle.conditioners)) is not None:
        tensors[_TABLE], config["num_class_embeds"] = table, table.shape[0]
    return config, tensors


def _write_encoder(bundle: Bundle, name: str) -> tuple[Json, dict[str, Tensor]]:
    encoder, part = ENCODERS.get(name), bundle.conditioners[name]
    if encoder is None or encoder.write is None:
        raise ValueError(f"diffusers has no component for the conditioner {name}; save it as orbax")
    prefix = bundle.notes.get(f"{name}_prefix", _PREFIX) if name in CLIP_TEXTS else ""
    unprefixed = (PROJECTION,)  # the name that has no prefix
    tensors = {t if t in unprefixed else prefix + t: x for t, x in encoder.write(part).items()}
    config = encoder.module.config_from_fields(part.fields)
    if name in CLIP_TEXTS and PROJECTION in part.unused:
        tensors[PROJECTION] = part.unused[PROJECTION]
        config["architectures"] = ["CLIPTextModelWithProjection"]
        config["projection_dim"] = tensors[PROJECTION].shape[0]
    return config, tensors


_WRITERS: dict[str, Callable[[Bundle], tuple[Json, dict[str, Tensor]]]] = {
    "autoencoder": _write_autoencoder,
    "unet": _write_unet,
    "dit": dit.as_component,
    "mmdit": mmdit.as_component,
}
