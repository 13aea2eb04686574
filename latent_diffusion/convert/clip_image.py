"""CLIP's image encoder: its names, shapes and settings in transformers' words."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from latent_diffusion.convert.clip_text import open_clip_layers, transformers_layers
from latent_diffusion.convert.tables import SAME, Layout, Leaf, Rule, Table
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.clip import ACTIVATIONS
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.types import lookup

Fields = dict[str, Any]

_WHOLE = "vision_model"
_ROW = Layout(lambda w: w[0], lambda x: (x[None],))
# Of the embeddings, where noise is added to them; files that have them keep them by themselves.
STATISTICS = ("mean", "std")


def statistics_table(prefix: str = "") -> Table:
    """Their names, where every one begins with `prefix`."""
    return (Rule("", prefix, tuple(Leaf(name, (name,), _ROW) for name in STATISTICS)),)


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """CLIPVisionModelWithProjection's names; a whole CLIPModel has the same."""
    arrays = (
        Leaf("class_embedding", (".class_embedding",), SAME),
        Leaf("position_embedding", (".position_embedding.weight",), SAME),
    )
    layers = rf"{_WHOLE}.encoder.layers.\g<i>"
    return (
        Rule("", f"{_WHOLE}.embeddings", arrays),
        Rule("patch_embedding", f"{_WHOLE}.embeddings.patch_embedding", "conv"),
        Rule("pre_layernorm", f"{_WHOLE}.pre_layrnorm", "norm"),  # their spelling
        Rule("post_layernorm", f"{_WHOLE}.post_layernorm", "norm"),
        Rule("visual_projection", "visual_projection", "linear"),
        *transformers_layers(layers, ClipImage(**fields).num_heads),
    )


def open_clip_table(fields: Mapping[str, Any]) -> Table:
    """The names of OpenAI's and OpenCLIP's code, below `visual.`."""
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
    """Tensors that may be left over: the other half of a whole CLIP, and constant buffers."""
    return (
        rf"{_WHOLE}\.embeddings\.position_ids",
        r"text_model\..*",
        r"text_projection\.weight",
        "logit_scale",
    )


def shapes(fields: Mapping[str, Any]) -> Any:
    """The tree of parameter shapes of an encoder with these fields."""
    module, one = ClipImage(**fields), (1,)
    batch = {
        "image": jax.ShapeDtypeStruct((1, 2, 2, 3), "float32"),
        "noise_level": jax.ShapeDtypeStruct(one, "int32"),
        "embedding_noise": jax.ShapeDtypeStruct((1, module.projection_dim), "float32"),
    }
    drop = jax.ShapeDtypeStruct(one, bool)
    return jax.eval_shape(module.init, jax.random.key(0), batch, drop)["params"]


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of CLIPVisionModelWithProjection or of a whole CLIPModel."""
    projection_dim = config["projection_dim"]  # a whole CLIP's own, not its vision_config's
    config = {**config, **config.get("vision_config", {})}
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"CLIP's layer_norm_eps={config['layer_norm_eps']}; supported: 1e-5")
    width, inner = config["hidden_size"], config["intermediate_size"]
    activation = config.get("hidden_act", "quick_gelu")
    lookup(ACTIVATIONS, activation, "CLIP's hidden_act")
    return {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "width": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_width": None if inner == 4 * width else inner,
        "activation": activation,
        "projection_dim": projection_dim,
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for CLIPVisionModelWithProjection."""
    module = ClipImage(**fields)
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": module.image_size,
        "patch_size": module.patch_size,
        "hidden_size": module.width,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "intermediate_size": module.mlp_width or 4 * module.width,
        "hidden_act": module.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": module.projection_dim,
    }


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Read the architecture off OpenCLIP's tensors, which begin after `visual.`.

    The number of heads is that of the known widths: 64 numbers each, but 80 in ViT-H's 1280.
    """
    width, _, patch_size, _ = tensors["conv1.weight"].shape
    places, inner = tensors["positional_embedding"].shape[0], tensors[f"{LAYERS}0.mlp.c_fc.weight"]
    depth = len({n.split(".")[2] for n in tensors if n.startswith(LAYERS)})
    is_huge = width == 1280
    return {
        "image_size": patch_size * math.isqrt(places - 1),
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "num_heads": width // (80 if is_huge else 64),
        "mlp_width": None if inner.shape[0] == 4 * width else inner.shape[0],
        "activation": "gelu" if is_huge else "quick_gelu",
        "projection_dim": tensors["proj"].shape[1],
    }


LAYERS = "transformer.resblocks."
# The text half of a whole CLIP.
OPEN_CLIP_UNUSED = (
    r"(transformer|token_embedding|ln_final)\..*",
    "positional_embedding|text_projection|logit_scale|attn_mask",
)
