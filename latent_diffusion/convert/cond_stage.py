"""The conditioner in the original's files, `cond_stage_model`: its kind, tensors and yaml."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert import autoencoder, clip_image, clip_text, text
from latent_diffusion.convert.bundle import Bundle, Part, conditioner_shapes, read_part
from latent_diffusion.convert.encoders import read_encoder
from latent_diffusion.convert.inputs import CLASS, table_of
from latent_diffusion.convert.settings import Settings, check_class
from latent_diffusion.convert.tables import Rule, matching, prefixed, within, write_tensors
from latent_diffusion.core.types import lookup
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.nets.conditioners.maps import SpatialRescaler
from latent_diffusion.nets.conditioners.pictures import LowRes

log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Parameters = Mapping[str, Any]
CLIP_PREFIX, OPEN_CLIP_PREFIX = "transformer.text_model.", "model."
VISUAL, EMBEDDER, AUGMENTOR = "visual.", "embedder.model.", "noise_augmentor.data_"
LAYOUT = (8192, 92)  # vocabulary and length of the paper's boxes; they distinguish them from words
_CLASSES = (Rule("embedding", "embedding", "embedding"),)
_RESCALER = (Rule("channel_mapper", "channel_mapper", "conv"),)
_RESCALER_SETTINGS = Settings(
    names={
        "n_stages": "num_stages",
        "in_channels": "num_classes",
        "out_channels": "out_channels",
        "bias": "use_bias",
    },
    defaults={"n_stages": 1, "in_channels": 3, "bias": False},
    optional={"out_channels": 3},
    checked={"method": ("bilinear",), "multiplier": (0.5,)},
)
_CLASS_SETTINGS = Settings(
    defaults={"n_classes": 1000}, required={"embed_dim": 512}, harmless=("key",)
)
# Names and the like by which the original loads an encoder; the tensors show its architecture.
_NAMES = ("version", "device", "freeze", "arch", "ucg_rate", "model", "jit")
_LENGTH = {"max_length": (77,)}
_CLIP_SETTINGS = Settings(
    checked={**_LENGTH, "layer": ("last",), "layer_idx": (None,)}, harmless=_NAMES
)
_OPEN_CLIP_SETTINGS = Settings(defaults={"layer": "last"}, checked=_LENGTH, harmless=_NAMES)
_LAYERS = {0: "last", 1: "penultimate"}  # number of skipped last layers → setting
_IMAGE_SETTINGS = Settings(checked={"antialias": (True,), "layer": ("pooled",)}, harmless=_NAMES)
_NOISE_SCHEDULE = Settings(
    defaults={
        "timesteps": 1000,
        "beta_schedule": "linear",
        "linear_start": 1e-4,
        "linear_end": 0.02,
    },
    checked={"cosine_s": (8e-3,)},
)
_NOISING = Settings(
    optional={"noise_schedule_config": {}},
    defaults={"max_noise_level": 1000},
    harmless=("timestep_dim", "clip_stats_path", "to_cuda"),
)
_MODULE = Settings(defaults={"target": ""}, optional={"params": {}})


def read(where: Path, tensors: Tensors, params: Parameters) -> dict[str, Part]:
    """Read the conditioner; the name of one of its tensors shows its kind.

    Returns no conditioner where the tensors are a copy of the first stage. params: the yaml's.
    Raises ValueError for tensors of an unknown conditioner.
    """
    if not tensors or "encoder.conv_in.weight" in tensors:
        return {}
    for mark, reader in CONDITIONERS.items():
        if mark in tensors:
            return reader(where, tensors, params)
    some = ", ".join(list(tensors)[:3])
    raise ValueError(f"{where}: unknown conditioner: its tensors are {some} …")


def _yaml_settings(params: Parameters, settings: Settings, *classes: str) -> dict[str, Any]:
    """The settings in `cond_stage_config`, whose class is one of `classes`; empty without yaml."""
    if not params:
        return {}
    return _settings_of(params.get("cond_stage_config"), "cond_stage_config", settings, *classes)


def _agree(settings: Parameters, shown: Mapping[str, Any]) -> None:
    """Raise ValueError where settings of the yaml differ from what the tensors show."""
    for name, value in shown.items():
        if settings and settings[name] != value:
            raise ValueError(
                f"cond_stage_config.{name}={settings[name]}, but the tensors have {value}"
            )


def _read_text(where: Path, tensors: Tensors, params: Parameters) -> dict[str, Part]:
    """Read the paper's transformer, whose tokens are words or boxes."""
    part = read_encoder("text", where, tensors)
    fields = part.fields
    names = {theirs: fields[ours] for theirs, ours in text.YAML.names.items()}
    _agree(_yaml_settings(params, text.YAML, "BERTEmbedder", "TransformerEmbedder"), names)
    if (part.fields["vocab_size"], part.fields["max_length"]) != LAYOUT:
        return {"text": part}
    fields = {name: value for name, value in part.fields.items() if name != "empty"}
    inner = {f"transformer/{path}": tensor for path, tensor in part.params.items()}
    return {"layout": Part(fields, inner, part.unused)}


def _read_class_label(where: Path, tensors: Tensors, params: Parameters) -> dict[str, Part]:
    rows, width = tensors["embedding.weight"].shape
    _agree(
        _yaml_settings(params, _CLASS_SETTINGS, "ClassEmbedder"),
        {"n_classes": rows, "embed_dim": width},
    )
    fields = {"num_classes": rows - 1, "width": width}
    shapes = conditioner_shapes("class_label", fields)
    return {"class_label": read_part(where, fields, _CLASSES, shapes, tensors)}


def _read_rescaler(where: Path, tensors: Tensors, params: Parameters) -> dict[str, Part]:
    out_channels, num_classes = tensors["channel_mapper.weight"].shape[:2]
    said = _yaml_settings(params, _RESCALER_SETTINGS, "SpatialRescaler")
    bias = "channel_mapper.bias" in tensors
    _agree(said, {"in_channels": num_classes, "out_channels": out_channels, "bias": bias})
    fields = {
        "num_classes": num_classes,
        "num_stages": said.get("n_stages", 2),
        "out_channels": out_channels,
        "use_bias": bias,
    }
    shapes = conditioner_shapes("spatial_rescaler", fields)
    return {"spatial_rescaler": read_part(where, fields, _RESCALER, shapes, tensors)}


def _read_clip(where: Path, tensors: Tensors, params: Parameters) -> dict[str, Part]:
    """Read the text encoder of Stable Diffusion 1 or 2."""
    if f"{OPEN_CLIP_PREFIX}token_embedding.weight" not in tensors:
        _yaml_settings(params, _CLIP_SETTINGS, "FrozenCLIPEmbedder")
        return {"clip_text": read_encoder("clip_text", where, tensors)}
    said = _yaml_settings(params, _OPEN_CLIP_SETTINGS, "FrozenOpenCLIPEmbedder")
    layer = said.get("layer", "penultimate")
    layers = {name: skipped for skipped, name in _LAYERS.items()}
    skipped = lookup(layers, layer, "FrozenOpenCLIPEmbedder.layer")
    return {"clip_text": read_encoder("clip_text", where, tensors, chosen={"skip_last": skipped})}


CONDITIONERS: dict[str, Callable[[Path, Tensors, Parameters], dict[str, Part]]] = {
    "transformer.token_emb.weight": _read_text,
    "embedding.weight": _read_class_label,
    "channel_mapper.weight": _read_rescaler,
    f"{CLIP_PREFIX}embeddings.token_embedding.weight": _read_clip,
    f"{OPEN_CLIP_PREFIX}token_embedding.weight": _read_clip,
}


def read_embedder(
    where: Path, tensors: Tensors, statistics: Tensors, params: Parameters
) -> dict[str, Part]:
    """Read unCLIP's image encoder, if the file has one, from the tensors of its whole CLIP.

    statistics: `mean` and `std` [1 D], which standardise embeddings before noise is added. A file
    without them gets 0 and 1: these are the values of the model with ViT-H; that with ViT-L has
    them in a separate file. params: the yaml's.
    """
    if not tensors:
        return {}
    levels = 1000
    if params:
        _settings_of(
            params["embedder_config"],
            "embedder_config",
            _IMAGE_SETTINGS,
            *("ClipImageEmbedder", "FrozenOpenCLIPImageEmbedder"),
        )
        kind = "CLIPEmbeddingNoiseAugmentation"
        schedule = _noise_schedule(params["noise_aug_config"], "noise_aug_config", kind)
        levels = schedule["timesteps"]
        if schedule["beta_schedule"] != "squaredcos_cap_v2":
            raise ValueError(f"noise_aug_config: a beta_schedule of {schedule['beta_schedule']!r}")
    fields = {**clip_image.fields_from_shapes(within(tensors, VISUAL)), "num_levels": levels}
    if not statistics:
        if fields["activation"] == "quick_gelu":
            log.warning("%s: lacks mean and deviation of image embeddings; taken as 0, 1", where)
        row = np.zeros((1, fields["projection_dim"]), np.float32)
        statistics = {"mean": in_memory(row), "std": in_memory(row + 1)}
    table = [*prefixed(clip_image.open_clip_table(fields), VISUAL), *clip_image.statistics_table()]
    shapes, unused = clip_image.shapes(fields), clip_image.OPEN_CLIP_UNUSED
    part = read_part(where, fields, table, shapes, {**tensors, **statistics}, unused)
    return {"clip_image": part}


def low_res_from_yaml(config: Any) -> dict[str, Any]:
    """The fields, in `low_scale_config`, of the noise that the upscaler's pipeline adds."""
    schedule = _noise_schedule(config, "low_scale_config", "ImageConcatWithNoiseAugmentation")
    if schedule["beta_schedule"] != "linear":
        raise ValueError(f"low_scale_config: a beta_schedule of {schedule['beta_schedule']!r}")
    return {
        "beta_start": schedule["linear_start"],
        "beta_end": schedule["linear_end"],
        "max_noise_level": schedule["max_noise_level"],
    }


def low_res_to_yaml(part: Part | None) -> dict[str, Any]:
    """The inverse of `low_res_from_yaml`: {"low_scale_config": …}, or empty without noise."""
    if part is None or not part.fields.get("num_levels"):
        return {}
    module = LowRes(**part.fields)
    ends = {"linear_start": module.beta_start, "linear_end": module.beta_end}
    params = {"noise_schedule_config": ends, "max_noise_level": module.max_noise_level}
    name = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
    return {"low_scale_config": {"target": name, "params": params}}


def _settings_of(config: Any, name: str, settings: Settings, *classes: str) -> dict[str, Any]:
    """The checked settings of a module in the yaml, whose class is one of `classes`."""
    module = _MODULE.complete(config or {}, name)
    check_class(module, classes, name)
    return settings.complete(module["params"] or {}, name)


def _noise_schedule(config: Any, name: str, kind: str) -> dict[str, Any]:
    """The settings of the noise that a module of the class `kind` adds to its condition."""
    noising = _settings_of(config, name, _NOISING, kind)
    schedule = _NOISE_SCHEDULE.complete(noising["noise_schedule_config"] or {}, name)
    return {**schedule, "max_noise_level": noising["max_noise_level"]}


# --------------------------------------------------------------------------------------- writing

Written = tuple[dict[str, Tensor], Any]
ENCODERS = "ldm.modules.encoders.modules"
CONCAT = ("masked_image", "low_res", "depth")  # conditions that need no module in the original


def write(bundle: Bundle) -> tuple[dict[str, Tensor], Any, str | None]:
    """Return tensors without prefix, `cond_stage_config` and `conditioning_key`.

    Raises ValueError for conditioners that no model of the original has together.
    """
    parts = dict(bundle.conditioners)
    if _is_noised(parts):
        del parts["clip_image"]  # see `write_embedder`
    concat = next((parts.pop(name) for name in CONCAT if name in parts), None)
    if len(parts) > 1 or not parts.keys() <= WRITERS.keys():
        names = " + ".join(sorted(bundle.conditioners))
        raise ValueError(f"the original has no model conditioned by {names}; save it as orbax")
    tensors: dict[str, Tensor] = {}
    config: Any = "__is_unconditional__" if concat is None else "__is_first_stage__"
    for name, part in parts.items():
        tensors, config = WRITERS[name](part)
    twice = concat is not None and bundle.notes.get("first_stage_twice")
    if twice and bundle.autoencoder is not None:
        table = autoencoder.compvis_table(bundle.autoencoder.fields)
        tensors = write_tensors(table, bundle.autoencoder.params)
    return tensors, config, _key(bundle.conditioners, concat is not None, parts)


def _key(conditioners: Mapping[str, Part], concat: bool, parts: Mapping[str, Part]) -> str | None:
    """The `conditioning_key`: how conditions enter the U-Net. parts: conditioners with a module."""
    in_unet = table_of(conditioners) is not None
    if "class_label" in parts and in_unet:
        return "adm"
    if concat:
        return ("hybrid" if parts else "concat") + ("-adm" if in_unet else "")
    if "spatial_rescaler" in parts:
        return "concat"
    return "crossattn" + ("-adm" if _is_noised(conditioners) else "") if parts else None


def _is_noised(conditioners: Mapping[str, Part]) -> bool:
    """Whether unCLIP's image encoder is among the conditioners."""
    part = conditioners.get("clip_image")
    return part is not None and bool(part.fields.get("num_levels"))


def write_embedder(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return unCLIP's image encoder and statistics under their full names, and their yaml."""
    if not _is_noised(bundle.conditioners):
        return {}, {}
    part = bundle.conditioners["clip_image"]
    names = prefixed(clip_image.open_clip_table(part.fields), EMBEDDER + VISUAL)
    tensors = write_tensors(names, clip_image.without_statistics(part))
    unused = matching(clip_image.OPEN_CLIP_UNUSED, part.unused)
    tensors |= {EMBEDDER + name: tensor for name, tensor in unused.items()}
    statistics = {k: part.params[k] for k in clip_image.STATISTICS}
    if statistics["mean"].read().any() or (statistics["std"].read() != 1).any():
        tensors |= write_tensors(clip_image.statistics_table(AUGMENTOR), statistics)
    module = ClipImage(**part.fields)
    openai = module.activation == "quick_gelu"
    shown = clip_image.fields_from_shapes(within(tensors, EMBEDDER + VISUAL))
    for name in ("num_heads", "activation"):
        if (said := getattr(module, name)) != shown[name]:
            raise ValueError(
                f"the original's image encoder of width {module.width} has {name} {shown[name]}, "
                f"this model {said}; save it as diffusers"
            )
    schedule = {"timesteps": part.fields["num_levels"], "beta_schedule": "squaredcos_cap_v2"}
    noising = {"timestep_dim": part.fields["projection_dim"], "noise_schedule_config": schedule}
    return tensors, {
        "embedder_config": _config("ClipImageEmbedder", model="ViT-L/14")
        if openai
        else _config("FrozenOpenCLIPImageEmbedder"),
        "noise_aug_config": _config("CLIPEmbeddingNoiseAugmentation", **noising),
    }


def _config(name: str, **params: Any) -> dict[str, Any]:
    """The yaml of one of the original's encoders."""
    return {"target": f"{ENCODERS}.{name}", "params": params}


def _write_class_label(part: Part) -> Written:
    if part.fields.get("route") == "vector":  # the U-Net has the table
        return {}, {"target": "torch.nn.Identity"}
    rows, width = part.params[CLASS].shape
    config = _config("ClassEmbedder", n_classes=rows, embed_dim=width, key="class_label")
    return write_tensors(_CLASSES, part.params), config


def _write_text(part: Part) -> Written:
    tensors = {f"transformer.{name}": t for name, t in text.compvis_tensors(part).items()}
    return tensors, text.yaml_from_fields(part.fields)


def _write_layout(part: Part) -> Written:
    inner = within(part.params, "transformer/")
    tensors, config = _write_text(Part(text.of_corners(part.fields), inner, part.unused))
    config["params"]["use_tokenizer"] = False
    return tensors, config


def _write_rescaler(part: Part) -> Written:
    params = _RESCALER_SETTINGS.write(SpatialRescaler(**part.fields))
    return write_tensors(_RESCALER, part.params), _config("SpatialRescaler", **params)


def _write_clip(part: Part) -> Written:
    """Write with OpenCLIP's names where the activation is OpenCLIP's, else with transformers'.

    Raises ValueError where heads don't have 64 channels, and for other fields that the original's
    class, and so the reader of its files, has no setting for.
    """
    module = ClipText(**part.fields)
    if module.num_heads * 64 != module.width:
        raise ValueError(
            f"the original's CLIP has heads of 64 channels, this model {module.num_heads} in "
            f"{module.width} channels; save it as diffusers"
        )
    if module.activation == "gelu":
        if module.skip_last not in _LAYERS:
            raise ValueError(f"OpenCLIP skips 0 or 1 layers, this model {module.skip_last}")
        config = _config("FrozenOpenCLIPEmbedder", layer=_LAYERS[module.skip_last])
        prefix, tensors = OPEN_CLIP_PREFIX, clip_text.open_clip_tensors(part)
    else:
        config = {"target": f"{ENCODERS}.FrozenCLIPEmbedder"}
        prefix, tensors = CLIP_PREFIX, clip_text.transformers_tensors(part)
    pad_id = 0 if module.activation == "gelu" else module.empty[1]
    usual = {"pad_id": pad_id, "final_norm": True, "projection_dim": None, "zero_null": False}
    for name, theirs in usual.items():
        if (ours := getattr(module, name)) != theirs:
            raise ValueError(
                f"the original's CLIP has {name}={theirs}, this model {ours}; save it as diffusers"
            )
    return {prefix + name: tensor for name, tensor in tensors.items()}, config


WRITERS: dict[str, Callable[[Part], Written]] = {
    "class_label": _write_class_label,
    "text": _write_text,
    "layout": _write_layout,
    "spatial_rescaler": _write_rescaler,
    "clip_text": _write_clip,
}
