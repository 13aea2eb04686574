"""diffusers' folders: whole pipelines and single components, read and written.

A pipeline is a folder per component and a model_index.json that names their classes; a component
is a config.json and a weight file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert import autoencoder, scheduler, text, unet
from latent_diffusion.convert.bundle import (
    Bundle,
    Part,
    flat,
    input_widths,
    with_folded_scale,
)
from latent_diffusion.convert.tables import Table, read_tensors, write_tensors
from latent_diffusion.convert.tensors import (
    Tensor,
    find_weights,
    in_memory,
    open_tensors,
    write_safetensors,
)
from latent_diffusion.types import lookup

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
Progress = Callable[[int], Any]
Json = dict[str, Any]


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline or a component."""
    if (path / "model_index.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    config = _load_json(path / "config.json")
    return "_class_name" in config or "architectures" in config


def read_diffusers(path: Path, variant: str | None = None) -> Bundle:
    """Read a pipeline's or a component's folder. Raises ValueError with the reason for refusing."""
    if not (path / "model_index.json").is_file():
        return replace(_read_component(path, variant), diffusion=scheduler.ASSUMED)
    index = _load_json(path / "model_index.json")
    bundle = Bundle(diffusion=scheduler.ASSUMED, notes={"pipeline": index["_class_name"]})
    for name, entry in index.items():
        if isinstance(entry, list) and entry[-1] in COMPONENTS:
            bundle = _merge(bundle, _read_component(path / name, variant))
    if (path / "scheduler").is_dir():
        config = _load_json(path / "scheduler" / "scheduler_config.json")
        diffusion, sampling = scheduler.from_diffusers(config)
        sampling["guidance_scale"] = 7.5 if "StableDiffusion" in index["_class_name"] else 1.0
        notes = {**bundle.notes, "scheduler": config}
        bundle = replace(bundle, diffusion=diffusion, sampling=sampling, notes=notes)
    side = bundle.notes.get("unet", {}).get("sample_size")
    if isinstance(side, int):
        bundle = replace(bundle, image_size=side * bundle.downsampling)
    return bundle


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
    return read(weights, {**config, "_class_name": name}, open_tensors(weights).tensors)


def _load_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"can't read {path}: not a JSON object")
    return content


def _part(
    where: Path,
    fields: Mapping[str, Any],
    table: Table,
    tree: Any,
    tensors: Mapping[str, Tensor],
    ignored: tuple[str, ...] = (),
) -> Part:
    shapes = {path: leaf.shape for path, leaf in flat(tree).items()}
    return Part(fields, read_tensors(table, shapes, tensors, str(where), ignored))


def _read_autoencoder(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = autoencoder.fields_from_diffusers(config)
    table, tree = autoencoder.diffusers_table(fields), autoencoder.shapes(fields)
    part = _part(where, fields, table, tree, autoencoder.with_new_names(tensors))
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
    linear = bool(config.get("use_linear_projection", False))
    tree = unet.shapes(fields, config["in_channels"], config.get("cross_attention_dim"), None)
    part = _part(where, fields, unet.diffusers_table(fields, linear), tree, tensors)
    return Bundle(unet=part, notes={"linear_projections": linear, "unet": config})


def _read_bert(where: Path, config: Json, tensors: Mapping[str, Tensor]) -> Bundle:
    fields = text.fields_from_diffusers(config)
    table, tree = text.diffusers_table(fields), text.shapes(fields)
    part = _part(where, fields, table, tree, tensors, text.UNUSED)
    return Bundle(conditioners={"text": part}, notes={"text": config})


COMPONENTS: dict[str, Callable[[Path, Json, Mapping[str, Tensor]], Bundle]] = {
    "AutoencoderKL": _read_autoencoder,
    "VQModel": _read_autoencoder,
    "UNet2DModel": _read_unet,
    "UNet2DConditionModel": _read_unet,
    "LDMBertModel": _read_bert,
}


# --------------------------------------------------------------------------------------- writing


def write_diffusers(bundle: Bundle, path: Path, progress: Progress = lambda count: None) -> None:
    """Write a folder that diffusers loads: a pipeline, or a component where there is only one.

    A per-channel latent scale is folded into the autoencoder (`with_folded_scale`). Our word
    tokenizer isn't one that diffusers can use: it is put beside, as tokenizer/word_tokenizer.json.
    """
    bundle = with_folded_scale(bundle)
    parts = [name for name, _ in bundle.parts()]
    if not parts:
        raise ValueError("there is nothing to save: the model is empty")
    if len(parts) == 1:
        _write_component(bundle, parts[0], path, progress)
        return
    pipeline = bundle.notes.get("pipeline") or (
        "LDMTextToImagePipeline" if "text" in parts else "LDMPipeline"
    )
    vae = "vqvae" if pipeline.startswith("LDM") else "vae"
    folders = {"autoencoder": vae, "unet": "unet", "text": "bert"}
    index: Json = {"_class_name": pipeline, "_diffusers_version": VERSION}
    for name in parts:
        folder = lookup(folders, name, "part in a folder of diffusers")
        config = _write_component(bundle, name, path / folder, progress)
        library = "latent_diffusion" if name == "text" else "diffusers"
        index[folder] = [library, config.get("_class_name") or config["architectures"][0]]
    settings = bundle.notes.get("scheduler") or scheduler.to_diffusers(bundle.diffusion)
    _save_json(path / "scheduler" / "scheduler_config.json", settings)
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    if "text" in parts:
        index["tokenizer"] = [None, None]
    if bundle.tokenizer is not None:
        (path / "tokenizer").mkdir(parents=True, exist_ok=True)
        bundle.tokenizer.save(path / "tokenizer" / "word_tokenizer.json")
    _save_json(path / "model_index.json", index)


VERSION = "0.30.0"  # of diffusers, whose names for settings these are


def as_component(bundle: Bundle, name: str) -> "Written":
    """config.json, tensors (still unread) and file stem of one of a bundle's parts."""
    config, tensors, stem = _WRITERS[name](bundle)
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
    return config, write_tensors(unet.diffusers_table(fields, linear), bundle.unet.params), STEMS[0]


def _write_text(bundle: Bundle) -> Written:
    part = bundle.conditioners["text"]
    tensors = write_tensors(text.diffusers_table(part.fields), part.params)
    # diffusers' class insists on the head that nothing uses.
    vocabulary, width = part.params["token_emb/embedding"].shape
    dtype = part.params["token_emb/embedding"].dtype
    for name, shape in (("weight", (vocabulary, width)), ("bias", (vocabulary,))):
        tensors[f"to_logits.{name}"] = in_memory(np.zeros(shape, dtype))
    return text.diffusers_from_fields(part.fields), tensors, "model"


_WRITERS: dict[str, Callable[[Bundle], Written]] = {
    "autoencoder": _write_autoencoder,
    "unet": _write_unet,
    "text": _write_text,
}


def _save_json(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
