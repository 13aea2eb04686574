"""CLIP's image encoder: its tensor names and settings in transformers and in OpenCLIP."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from latent_diffusion.convert import clip_text, tables
from latent_diffusion.convert.bundle import Part, conditioner_shapes
from latent_diffusion.convert.clip_text import (
    OPEN_CLIP,
    half_of,
    open_clip_layers,
    transformers_layers,
)
from latent_diffusion.convert.settings import Fields, encoder_settings, usual_mlp
from latent_diffusion.convert.tables import SAME, Layout, Leaf, Rule, Table, count
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.conditioners.clip_image import ClipImage

shapes = partial(conditioner_shapes, "clip_image")
_read_config, config_from_fields = encoder_settings(
    ClipImage,
    "CLIPVisionModelWithProjection",
    "clip_vision_model",
    names={
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_act": "activation",
        "projection_dim": "projection_dim",
    },
    defaults={
        "image_size": 224,
        "patch_size": 32,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
    },
    allowed={
        "layer_norm_eps": (1e-5,),
        "hidden_act": ("quick_gelu", "gelu"),
        "num_channels": (3,),
    },
    harmless=("is_decoder", "add_cross_attention"),
)
_WHOLE = "vision_model"
_ROW = Layout("row", lambda w: w[0], lambda x: (x[None],))
# Mean and standard deviation of the embeddings, for adding noise; in files, apart from the encoder.
STATISTICS = ("mean", "std")
# The text half of a whole CLIP in OpenCLIP's names.
OPEN_CLIP_UNUSED = (
    r"(transformer|token_embedding|ln_final)\..*",
    "positional_embedding|text_projection|logit_scale|attn_mask",
)


def statistics_table(prefix: str = "") -> Table:
    """The names of the statistics, each of which begins with `prefix`."""
    return (Rule("", prefix, tuple(Leaf(name, (name,), _ROW) for name in STATISTICS)),)


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """CLIPVisionModelWithProjection's names, which a whole CLIPModel has as well."""
    arrays = (
        Leaf("class_embedding", (".class_embedding",), SAME),
        Leaf("position_embedding", (".position_embedding.weight",), SAME),
    )
    layers = rf"{_WHOLE}.encoder.layers.\g<i>"
    return (
        Rule("", f"{_WHOLE}.embeddings", arrays),
        Rule("patch_embedding", f"{_WHOLE}.embeddings.patch_embedding", "conv"),
        Rule("pre_layernorm", f"{_WHOLE}.pre_layrnorm", "norm"),  # transformers spells it so
        Rule("post_layernorm", f"{_WHOLE}.post_layernorm", "norm"),
        Rule("visual_projection", "visual_projection", "linear"),
        *transformers_layers(layers, ClipImage(**fields).num_heads),
    )


def open_clip_table(fields: Mapping[str, Any]) -> Table:
    """The names of OpenAI's and OpenCLIP's code, without their prefix `visual.`."""
    arrays = (
        Leaf("class_embedding", ("class_embedding",), SAME),
        Leaf("position_embedding", ("positional_embedding",), SAME),
    )
    return (
        Rule("", "", arrays),
        Rule("patch_embedding", "conv1", "conv"),
        Rule("pre_layernorm", "ln_pre", "norm"),
        Rule("post_layernorm", "ln_post", "norm"),
        Rule("visual_projection", "", (Leaf("kernel", ("proj",), SAME),)),
        *open_clip_layers(),
    )


def unused(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left over: the text half of a whole CLIP, and constant buffers."""
    return (
        rf"{_WHOLE}\.embeddings\.position_ids",
        r"text_model\..*",
        r"text_projection\.weight",
        "logit_scale",
    )


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of CLIPVisionModelWithProjection or of a whole CLIPModel.

    A whole CLIPModel has `projection_dim` beside its `vision_config`, and not the one inside it.
    """
    if "vision_config" not in config:
        return _read_config(config)
    width = clip_text.WHOLE.complete(config, "CLIPModel")["projection_dim"]
    return _read_config({**half_of(config, "vision_config"), "projection_dim": width})


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture from OpenCLIP's tensors, by their names without `visual.`.

    Shapes don't show the number of heads: a head has 64 channels, or 80 in ViT-H (width 1280).
    """
    width, _, patch_size, _ = tensors["conv1.weight"].shape
    is_huge = width == 1280
    fields = {
        "image_size": patch_size * math.isqrt(tensors["positional_embedding"].shape[0] - 1),
        "patch_size": patch_size,
        "width": width,
        "depth": count(tensors, OPEN_CLIP),
        "num_heads": width // (80 if is_huge else 64),
        "mlp_width": tensors[f"{OPEN_CLIP}0.mlp.c_fc.weight"].shape[0],
        "activation": "gelu" if is_huge else "quick_gelu",
        "projection_dim": tensors["proj"].shape[1],
    }
    return usual_mlp(fields)


def without_statistics(part: Part) -> dict[str, Tensor]:
    """The encoder's parameters without the statistics, by our paths."""
    return {path: t for path, t in part.params.items() if path not in STATISTICS}


def transformers_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of an encoder's file under transformers' names, with the part's unused ones."""
    tensors = tables.write_tensors(transformers_table(part.fields), without_statistics(part))
    return tensors | tables.matching(unused(part.fields), part.unused)
