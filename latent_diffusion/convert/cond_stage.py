"""The original's `cond_stage_model`: which conditioner it is, its tensors and its yaml."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_diffusion.convert import autoencoder, clip_image, clip_text, text
from latent_diffusion.convert.bundle import Bundle, Part, read_part
from latent_diffusion.convert.inputs import CLASS, table_of
from latent_diffusion.convert.tables import Rule, below, matching, prefixed, write_tensors
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.conditioners.clip_image import ClipImage

log = logging.getLogger(__name__)


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
    fields.pop("empty", None)
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


def read_embedder(
    where: Path, tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor], params: Parameters
) -> dict[str, Part]:
    """unCLIP's image encoder, if there is one: the tensors of its whole CLIP.

    statistics: `mean` and `std` [1 D], which standardise embeddings before they are noised. Without
    them they are 0 and 1, as in the model of ViT-H; that of ViT-L has them in another file.
    """
    visual = below(tensors, VISUAL)
    if not tensors:
        return {}
    noising = params.get("noise_aug_config", {}).get("params", {})
    levels = noising.get("noise_schedule_config", {}).get("timesteps", 1000)
    fields = {**clip_image.fields_from_shapes(visual), "num_levels": levels}
    if not statistics:
        if fields["activation"] == "quick_gelu":
            log.warning("%s: lacks mean and deviation of image embeddings; taken as 0, 1", where)
        one = (1, fields["projection_dim"])
        statistics = {"mean": in_memory(np.zeros(one, "f")), "std": in_memory(np.ones(one, "f"))}
    table = [*prefixed(clip_image.open_clip_table(fields), VISUAL), *clip_image.statistics_table()]
    own, tree = {**tensors, **statistics}, clip_image.shapes(fields)
    return {"clip_image": read_part(where, fields, table, tree, own, clip_image.OPEN_CLIP_UNUSED)}


VISUAL = "visual."


# --------------------------------------------------------------------------------------- writing

Written = tuple[dict[str, Tensor], Any]
ENCODERS = "ldm.modules.encoders.modules"


def write(bundle: Bundle) -> tuple[dict[str, Tensor], Any, str | None]:
    """Tensors without prefix, `cond_stage_config` and `conditioning_key`."""
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
    """How the U-Net is told. parts: the conditioners that aren't concatenated as they are."""
    in_unet = table_of(conditioners) is not None
    if "class_label" in parts and in_unet:
        return "adm"
    if concat:
        return ("hybrid" if parts else "concat") + ("-adm" if in_unet else "")
    if "spatial_rescaler" in parts:
        return "concat"
    return "crossattn" + ("-adm" if _is_noised(conditioners) else "") if parts else None


def _is_noised(conditioners: Mapping[str, Part]) -> bool:
    """Whether there is unCLIP's image encoder."""
    return bool(
        "clip_image" in conditioners and conditioners["clip_image"].fields.get("num_levels")
    )


def write_embedder(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """unCLIP's image encoder and statistics under their whole names, and the yaml's words."""
    if not _is_noised(bundle.conditioners):
        return {}, {}
    part = bundle.conditioners["clip_image"]
    own = {k: t for k, t in part.params.items() if k not in clip_image.STATISTICS}
    tensors = {
        **write_tensors(prefixed(clip_image.open_clip_table(part.fields), EMBEDDER + VISUAL), own),
        **{EMBEDDER + n: t for n, t in matching(clip_image.OPEN_CLIP_UNUSED, part.unused).items()},
    }
    statistics = {k: part.params[k] for k in clip_image.STATISTICS}
    if statistics["mean"].read().any() or (statistics["std"].read() != 1).any():
        tensors |= write_tensors(clip_image.statistics_table(AUGMENTOR), statistics)
    width = part.fields["projection_dim"]
    schedule = {"timesteps": part.fields["num_levels"], "beta_schedule": "squaredcos_cap_v2"}
    openai = ClipImage(**part.fields).activation == "quick_gelu"
    kind = "ClipImageEmbedder" if openai else "FrozenOpenCLIPImageEmbedder"
    noising = f"{ENCODERS}.CLIPEmbeddingNoiseAugmentation"
    return tensors, {
        "embedder_config": {
            "target": f"{ENCODERS}.{kind}",
            "params": {"model": "ViT-L/14"} if openai else {},
        },
        "noise_aug_config": {
            "target": noising,
            "params": {"timestep_dim": width, "noise_schedule_config": schedule},
        },
    }


EMBEDDER = "embedder.model."
AUGMENTOR = "noise_augmentor.data_"
CONCAT = ("masked_image", "low_res", "depth")  # without a module of their own there


def _write_class_label(part: Part) -> Written:
    if part.fields.get("route") == "vector":  # the U-Net has the table
        return {}, {"target": "torch.nn.Identity"}
    table = part.params[CLASS]
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
