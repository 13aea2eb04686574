"""BERT's tensor names and settings in transformers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from latent_diffusion.convert.bundle import conditioner_shapes
from latent_diffusion.convert.settings import encoder_settings
from latent_diffusion.convert.tables import Rule, Table, inside, joint_qkv
from latent_diffusion.nets.conditioners.bert import Bert

_POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
shapes = partial(conditioner_shapes, "bert")
fields_from_config, config_from_fields = encoder_settings(
    Bert,
    "BertModel",
    "bert",
    names={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "type_vocab_size": "type_vocab_size",
        "pad_token_id": "pad_id",
    },
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    },
    allowed={
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-12,),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    harmless=("directionality", *(f"pooler_{name}" for name in _POOLER)),
)


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """BertModel's names, without the prefix `bert.` of some files."""
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
    """Tensors that may be left over: the pooler, heads for training, and constant buffers."""
    return (r"embeddings\.(position|token_type)_ids", r"pooler\..*", r"cls\..*")
