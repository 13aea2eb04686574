"""CLIP's image encoder: its names, shapes and settings in transformers' words."""

from collections.abc import Mapping
from typing import Any

import jax

from latent_diffusion.conditioners.clip_image import ClipImage
from latent_diffusion.convert.clip_text import transformers_layers
from latent_diffusion.convert.tables import SAME, Leaf, Rule, Table
from latent_diffusion.models.clip import ACTIVATIONS
from latent_diffusion.types import lookup

Fields = dict[str, Any]

_WHOLE = "vision_model"


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
    batch = {"image": jax.ShapeDtypeStruct((1, 2, 2, 3), "float32")}
    drop = jax.ShapeDtypeStruct((1,), bool)
    return jax.eval_shape(ClipImage(**fields).init, jax.random.key(0), batch, drop)["params"]


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
