"""The original's `cond_stage_model`: which conditioner it is, its tensors and its yaml."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from latent_diffusion.convert import autoencoder, clip_text, text
from latent_diffusion.convert.bundle import Bundle, Part, read_part
from latent_diffusion.convert.concat import NOISE_LEVEL
from latent_diffusion.convert.tables import Rule, below, write_tensors
from latent_diffusion.convert.tensors import Tensor


def read(where: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Part]:
    """The conditioner, recognised by a tensor of its own. A copy of the first stage is none."""
    if not tensors or "encoder.conv_in.weight" in tensors:
        return {}
    for mark, read in CONDITIONERS.items():
        if mark in tensors:
            return read(where, tensors, params)
    some = ", ".join(list(tensors)[:3])
    raise ValueError(f"{where}: unknown conditioner: its tensors are {some} …")


Parameters = Mapping[str, Any]


def _read_text(where: Path, tensors: Mapping[str, Tensor], params: Parameters) -> dict[str, Part]:
    """The paper's transformer, over words or over boxes."""
    tensors = below(tensors, "transformer.")
    fields = text.fields_from_shapes(tensors)
    table, tree = text.compvis_table(fields), text.shapes(fields)
    part = read_part(where, fields, table, tree, tensors, text.UNUSED)
    if (fields["vocab_size"], fields["max_length"]) != LAYOUT:
        return {"text": part}
    fields.pop("empty")
    inner = {f"transformer/{path}": tensor for path, tensor in part.params.items()}
    return {"layout": Part(fields, inner, part.unused)}


LAYOUT = (8192, 92)  # tokens and places of the paper's boxes, which nothing else tells from words


def _read_class_label(
    where: Path, tensors: Mapping[str, Tensor], params: Parameters
) -> dict[str, Part]:
    rows, width = tensors["embedding.weight"].shape
    fields = {"num_classes": rows - 1, "width": width}
    table = (Rule("embedding", "embedding", "embedding"),)
    tree = {"embedding": {"embedding": jax.ShapeDtypeStruct((rows, width), "float32")}}
    return {"class_label": read_part(where, fields, table, tree, tensors)}


def _read_rescaler(
    where: Path, tensors: Mapping[str, Tensor], params: Parameters
) -> dict[str, Part]:
    out_channels, num_classes = tensors["channel_mapper.weight"].shape[:2]
    own = params.get("cond_stage_config", {}).get("params", {})
    fields = {
        "num_classes": num_classes,
        "num_stages": own.get("n_stages", 2),
        "out_channels": out_channels,
        "use_bias": "channel_mapper.bias" in tensors,
    }
    tree: dict[str, Any] = {"kernel": jax.ShapeDtypeStruct((1, 1, num_classes, out_channels), "f")}
    if fields["use_bias"]:
        tree["bias"] = jax.ShapeDtypeStruct((out_channels,), "f")
    part = read_part(where, fields, _RESCALER, {"channel_mapper": tree}, tensors)
    return {"spatial_rescaler": part}


_RESCALER = (Rule("channel_mapper", "channel_mapper", "conv"),)


def _read_clip(where: Path, tensors: Mapping[str, Tensor], params: Parameters) -> dict[str, Part]:
    """Stable Diffusion 1's, in transformers' names."""
    tensors = below(tensors, CLIP_PREFIX)
    fields = clip_text.fields_from_shapes(tensors)
    table, tree = clip_text.transformers_table(fields), clip_text.shapes(fields)
    return {"clip_text": read_part(where, fields, table, tree, tensors, clip_text.unused(fields))}


def _read_open_clip(
    where: Path, tensors: Mapping[str, Tensor], params: Parameters
) -> dict[str, Part]:
    """Stable Diffusion 2's."""
    tensors = below(tensors, OPEN_CLIP_PREFIX)
    fields = clip_text.fields_from_shapes(tensors)
    table, tree = clip_text.open_clip_table(fields), clip_text.shapes(fields)
    return {"clip_text": read_part(where, fields, table, tree, tensors, clip_text.unused(fields))}


CLIP_PREFIX, OPEN_CLIP_PREFIX = "transformer.text_model.", "model."
Reader = Callable[[Path, Mapping[str, Tensor], Parameters], dict[str, Part]]
CONDITIONERS: dict[str, Reader] = {
    "transformer.token_emb.weight": _read_text,
    "embedding.weight": _read_class_label,
    "channel_mapper.weight": _read_rescaler,
    f"{CLIP_PREFIX}embeddings.token_embedding.weight": _read_clip,
    f"{OPEN_CLIP_PREFIX}token_embedding.weight": _read_open_clip,
}


# --------------------------------------------------------------------------------------- writing

Written = tuple[dict[str, Tensor], Any]
ENCODERS = "ldm.modules.encoders.modules"


def write(bundle: Bundle) -> tuple[dict[str, Tensor], Any, str | None]:
    """Tensors without prefix, `cond_stage_config` and `conditioning_key`."""
    parts = dict(bundle.conditioners)
    concat = next((parts.pop(name) for name in CONCAT if name in parts), None)
    if len(parts) > 1 or not parts.keys() <= WRITERS.keys():
        names = ", ".join(bundle.conditioners)
        raise ValueError(f"the original's format can't hold these conditioners: {names}")
    tensors: dict[str, Tensor] = {}
    config: Any = "__is_unconditional__" if concat is None else "__is_first_stage__"
    for name, part in parts.items():
        tensors, config = WRITERS[name](part)
    if concat is None:
        key = None if not parts else "concat" if "spatial_rescaler" in parts else "crossattn"
        return tensors, config, key
    if bundle.autoencoder is not None and bundle.notes.get("first_stage_twice"):
        table = autoencoder.compvis_table(bundle.autoencoder.fields)
        tensors = write_tensors(table, bundle.autoencoder.params)
    if noise_levels(bundle) is not None:
        return tensors, config, "hybrid-adm"
    return tensors, config, "hybrid" if parts else "concat"


def noise_levels(bundle: Bundle) -> Tensor | None:
    """The table of noise levels, which the original counts to the U-Net."""
    low_res = bundle.conditioners.get("low_res")
    return None if low_res is None else low_res.params.get(NOISE_LEVEL)


CONCAT = ("masked_image", "low_res", "depth")  # without a module of their own there


def _write_class_label(part: Part) -> Written:
    table = part.params["embedding/embedding"]
    params = {"n_classes": table.shape[0], "embed_dim": table.shape[1], "key": "class_label"}
    return {"embedding.weight": table}, {"target": f"{ENCODERS}.ClassEmbedder", "params": params}


def _write_text(part: Part) -> Written:
    tensors = write_tensors(text.compvis_table(part.fields), part.params)
    tensors.update(text.head(part))
    config = text.yaml_from_fields(part.fields)
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}, config


def _write_layout(part: Part) -> Written:
    inner = {k.removeprefix("transformer/"): t for k, t in part.params.items()}
    tensors, config = _write_text(Part(part.fields, inner, part.unused))
    config["params"]["use_tokenizer"] = False
    return tensors, config


def _write_rescaler(part: Part) -> Written:
    own = part.fields
    params = {
        "n_stages": own.get("num_stages", 2),
        "in_channels": own.get("num_classes", 182),
        "out_channels": own.get("out_channels", 3),
        "bias": own.get("use_bias", False),
    }
    tensors = write_tensors(_RESCALER, part.params)
    return tensors, {"target": f"{ENCODERS}.SpatialRescaler", "params": params}


def _write_clip(part: Part) -> Written:
    """OpenCLIP's spelling where the activation is its own."""
    if part.fields.get("activation") == "gelu":
        tensors = clip_text.open_clip_tensors(part)
        config = {
            "target": f"{ENCODERS}.FrozenOpenCLIPEmbedder",
            "params": {"layer": "penultimate"},
        }
        return {OPEN_CLIP_PREFIX + name: tensor for name, tensor in tensors.items()}, config
    tensors = clip_text.transformers_tensors(part)
    config = {"target": f"{ENCODERS}.FrozenCLIPEmbedder"}
    return {CLIP_PREFIX + name: tensor for name, tensor in tensors.items()}, config


WRITERS: dict[str, Callable[[Part], Written]] = {
    "class_label": _write_class_label,
    "text": _write_text,
    "layout": _write_layout,
    "spatial_rescaler": _write_rescaler,
    "clip_text": _write_clip,
}
