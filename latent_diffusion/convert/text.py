"""The paper's text transformer: its tensor names and settings in the original and in diffusers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from latent_diffusion.convert.bundle import Part, conditioner_shapes
from latent_diffusion.convert.settings import GENERAL, Fields, Settings
from latent_diffusion.convert.tables import SAME, Leaf, Rule, Table, count, write_tensors
from latent_diffusion.data.tokenizers import Tokenizer
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.conditioners.text import TextTransformer

_SETTINGS = Settings(
    names={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_length",
        "d_model": "width",
        "encoder_layers": "depth",
        "encoder_attention_heads": "num_heads",
        "head_dim": "head_dim",
    },
    defaults={
        "vocab_size": 30522,
        "max_position_embeddings": 77,
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 8,
        "head_dim": 64,
        "encoder_ffn_dim": 5120,
    },
    allowed={"activation_function": ("gelu",)},
    checked={"scale_embedding": (False,), "pruned_heads": ({}, None)},
    harmless={*GENERAL, "encoder_layerdrop", "init_std", "pad_token_id", "num_hidden_layers"},
)
YAML = Settings(  # those of BERTEmbedder and TransformerEmbedder
    names={
        "n_embed": "width",
        "n_layer": "depth",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_length",
    },
    defaults={"vocab_size": 30522, "max_seq_len": 77},
    required={"n_embed": 640, "n_layer": 32},
    harmless=("device", "use_tokenizer", "embedding_dropout"),
)
_POSITIONS = (Leaf("pos_emb", (".weight",), SAME),)

shapes = partial(conditioner_shapes, "text")


def compvis_table(fields: Mapping[str, Any]) -> Table:
    """x-transformers' names, without their prefix `transformer.`.

    Layers with even numbers are attention, layers with odd numbers are feed-forward.
    """
    layers = r"attn_layers.layers.\1"
    return (
        Rule("token_emb", "token_emb", "embedding"),
        Rule("", "pos_emb.emb", _POSITIONS),
        Rule("norm", "norm", "norm"),
        Rule(r"layers_(\d+)_norm", f"{layers}.0", "norm"),
        Rule(r"layers_(\d+)_attn/(\w+)", rf"{layers}.1.\2", "linear"),
        Rule(r"layers_(\d+)_net_0", f"{layers}.1.net.0.0", "linear"),
        Rule(r"layers_(\d+)_net_2", f"{layers}.1.net.2", "linear"),
    )


def diffusers_table(fields: Mapping[str, Any]) -> Table:
    """LDMBertModel's names, in which a layer has both attention and feed-forward."""
    table = [
        Rule("token_emb", "model.embed_tokens", "embedding"),
        Rule("", "model.embed_positions", _POSITIONS),
        Rule("norm", "model.layer_norm", "norm"),
    ]
    for i in range(fields["depth"]):
        layer, attends, feeds = f"model.layers.{i}", f"layers_{2 * i}", f"layers_{2 * i + 1}"
        table += [
            Rule(f"{attends}_norm", f"{layer}.self_attn_layer_norm", "norm"),
            Rule(rf"{attends}_attn/to_(\w+)", rf"{layer}.self_attn.\1_proj", "linear"),
            Rule(f"{feeds}_norm", f"{layer}.final_layer_norm", "norm"),
            Rule(f"{feeds}_net_0", f"{layer}.fc1", "linear"),
            Rule(f"{feeds}_net_2", f"{layer}.fc2", "linear"),
        ]
    return table


def unused(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left over: the output head, which conditions don't need."""
    return (r"to_logits\.(weight|bias)",)


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture from the original's tensors, where each head has 64 channels."""
    vocab_size, width = tensors["token_emb.weight"].shape
    return {
        "vocab_size": vocab_size,
        "max_length": tensors["pos_emb.emb.weight"].shape[0],
        "width": width,
        "depth": count(tensors, "attn_layers.layers.") // 2,
        "num_heads": tensors["attn_layers.layers.0.1.to_q.weight"].shape[0] // 64,
        "head_dim": 64,
        **_empty(vocab_size),
    }


def of_corners(fields: Mapping[str, Any]) -> Fields:
    """The fields of a conditioner of layouts, without those of its form.

    Raises ValueError for objects of two tokens, which the original's yaml can't express.
    """
    if fields.get("centres"):
        raise ValueError(
            "the original's layouts have two corners for an object, this model has its centre; "
            "save it as orbax"
        )
    return {name: x for name, x in fields.items() if name not in ("centres", "encode_crop")}


def with_tokenizer(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Fields:
    """The fields of any text encoder, with the tokenizer's empty prompt as null condition."""
    return {**fields, "empty": tokenizer.empty, "pad_id": tokenizer.pad_id}


def _empty(vocab_size: int) -> Fields:
    """The field `empty`, the empty prompt, if the vocabulary has the size of BERT's."""
    return {"empty": (101, 102)} if vocab_size == 30522 else {}


def _with_layers(fields: Mapping[str, Any]) -> TextTransformer:
    module = TextTransformer(**fields)
    if not module.depth:
        raise ValueError("this format's text transformer has layers (depth=0); save it as orbax")
    return module


def yaml_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`cond_stage_config` of the original's yaml; ValueError where its code can't express it."""
    module = _with_layers(fields)
    if (module.num_heads, module.head_dim) != (8, 64):
        raise ValueError(
            "the original's text transformer has 8 heads of 64 channels, this model "
            f"{module.num_heads} of {module.head_dim}; save it as orbax"
        )
    params = YAML.write(module)
    return {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of LDMBertModel."""
    fields = _SETTINGS.read(config, "LDMBertModel")
    inner, usual = config.get("encoder_ffn_dim", 5120), 4 * fields["width"]
    if inner != usual:
        raise ValueError(f"LDMBertModel.encoder_ffn_dim={inner}; supported: 4·d_model = {usual}")
    return {**fields, **_empty(fields["vocab_size"])}


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for LDMBertModel; ValueError for an encoder without layers."""
    module = _with_layers(fields)
    return {
        **_SETTINGS.write(module),
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "encoder_ffn_dim": 4 * module.width,
        "pad_token_id": 0,
        "dropout": 0.0,
    }


def _head(part: Part) -> dict[str, Tensor]:
    """The output head, which other libraries require: the file's, or zeros."""
    vocabulary = part.params["token_emb/embedding"]
    head_shapes = {"to_logits.weight": vocabulary.shape, "to_logits.bias": vocabulary.shape[:1]}
    return {
        name: part.unused.get(name, in_memory(np.zeros(shape, vocabulary.dtype)))
        for name, shape in head_shapes.items()
    }


def compvis_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of the original's file, without their prefix `transformer.`."""
    return write_tensors(compvis_table(part.fields), part.params) | _head(part)


def diffusers_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of a file of LDMBertModel."""
    return write_tensors(diffusers_table(part.fields), part.params) | _head(part)
