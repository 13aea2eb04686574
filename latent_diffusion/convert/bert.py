"""BERT's names, shapes and settings in transformers' words."""

from collections.abc import Mapping
from typing import Any

import jax

from latent_diffusion.convert.tables import Rule, Table, inside, joint_qkv
from latent_diffusion.nets.conditioners.bert import Bert

Fields = dict[str, Any]

_FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """BertModel's names, without the `bert.` that some files begin them with; see `below`."""
    qkv = joint_qkv(("query", "key", "value"), Bert(**fields).num_heads, interleaved=False)
    layer = (
        Rule("self_attn/qkv", "attention.self", qkv),
        Rule("self_attn/out_proj", "attention.output.dense", "linear"),
        Rule("norm1", "attention.output.LayerNorm", "norm"),
        Rule("fc1", "intermediate.dense", "linear"),
        Rule("fc2", "output.dense", "linear"),
        Rule("norm2", "output.LayerNorm", "norm"),
    )
    return (
        Rule(r"(\w+_embeddings)", r"embeddings.\1", "embedding"),
        Rule("norm", "embeddings.LayerNorm", "norm"),
        *inside([(r"layers_(?P<i>\d+)", r"encoder.layer.\g<i>")], layer),
    )


def unused(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left over: the pooler and heads of training, and constant buffers."""
    return (r"embeddings\.(position|token_type)_ids", r"pooler\..*", r"cls\..*")


def shapes(fields: Mapping[str, Any]) -> Any:
    """The tree of parameter shapes of an encoder with these fields."""
    batch = {"tokens": jax.ShapeDtypeStruct((1, 2), "int32")}
    drop = jax.ShapeDtypeStruct((1,), bool)
    return jax.eval_shape(Bert(**fields).init, jax.random.key(0), batch, drop)["params"]


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of BertModel."""
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"BertModel.{key}={config[key]!r}; supported: {value!r}")
    width, inner = config["hidden_size"], config["intermediate_size"]
    return {
        "vocab_size": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
        "type_vocab_size": config["type_vocab_size"],
        "width": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_width": None if inner == 4 * width else inner,
        "pad_id": config.get("pad_token_id", 0),
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for BertModel."""
    module = Bert(**fields)
    return {
        **_FIXED,
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.max_positions,
        "type_vocab_size": module.type_vocab_size,
        "hidden_size": module.width,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "intermediate_size": module.mlp_width or 4 * module.width,
        "pad_token_id": module.pad_id,
    }
