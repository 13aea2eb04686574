"""Text encoders' names, shapes and settings: the paper's transformer, in two spellings."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from latent_diffusion.convert.bundle import Part
from latent_diffusion.convert.tables import KINDS, Leaf, Rule, Table
from latent_diffusion.data.tokenizers import Tokenizer
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.conditioners.text import TextTransformer

Fields = dict[str, Any]

_POSITIONS = (Leaf("pos_emb", (".weight",), KINDS["norm"][0].layout),)
# A head over the vocabulary that training by next words left behind; no conditioning needs it.
UNUSED = (r"to_logits\.(weight|bias)",)


def compvis_table(fields: Mapping[str, Any]) -> Table:
    """x-transformers' names: even layers attend, odd ones feed forward. Without `transformer.`."""
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
    """LDMBertModel's names: attention and feed-forward share a layer."""
    table = [
        Rule("token_emb", "model.embed_tokens", "embedding"),
        Rule("", "model.embed_positions", _POSITIONS),
        Rule("norm", "model.layer_norm", "norm"),
    ]
    attention = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    for i in range(fields["depth"]):
        layer = f"model.layers.{i}"
        table += [
            Rule(f"layers_{2 * i}_norm", f"{layer}.self_attn_layer_norm", "norm"),
            Rule(f"layers_{2 * i + 1}_norm", f"{layer}.final_layer_norm", "norm"),
            Rule(f"layers_{2 * i + 1}_net_0", f"{layer}.fc1", "linear"),
            Rule(f"layers_{2 * i + 1}_net_2", f"{layer}.fc2", "linear"),
        ]
        table += [
            Rule(f"layers_{2 * i}_attn/{ours}", f"{layer}.self_attn.{theirs}", "linear")
            for ours, theirs in attention.items()
        ]
    return table


def head(part: Part) -> dict[str, Tensor]:
    """The head over the vocabulary, which others insist on: their own, or zeros."""
    vocabulary = part.params.get("token_emb/embedding")
    assert vocabulary is not None
    rows, width = vocabulary.shape
    zeros = {
        f"to_logits.{leaf}": in_memory(np.zeros(shape, vocabulary.dtype))
        for leaf, shape in (("weight", (rows, width)), ("bias", (rows,)))
    }
    return {name: part.unused.get(name, zeros[name]) for name in zeros}


def shapes(fields: Mapping[str, Any]) -> Any:
    """The tree of parameter shapes of a text transformer with these fields."""
    module = TextTransformer(**fields)
    batch = {"tokens": jax.ShapeDtypeStruct((1, module.max_length), "int32")}
    drop = jax.ShapeDtypeStruct((1,), bool)
    return jax.eval_shape(module.init, jax.random.key(0), batch, drop)["params"]


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Read the architecture off the original's tensors; heads are always 64 wide there."""
    vocab_size, width = tensors["token_emb.weight"].shape
    layers = {n.split(".")[2] for n in tensors if n.startswith("attn_layers.layers.")}
    inner = tensors["attn_layers.layers.0.1.to_q.weight"].shape[0]
    return {
        "vocab_size": vocab_size,
        "max_length": tensors["pos_emb.emb.weight"].shape[0],
        "width": width,
        "depth": len(layers) // 2,
        "num_heads": inner // 64,
        "head_dim": 64,
        **_empty(vocab_size),
    }


def with_tokenizer(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Fields:
    """Any text encoder's fields, such that its null condition is this tokenizer's empty prompt."""
    return {**fields, "empty": tokenizer.empty, "pad_id": tokenizer.pad_id}


def _empty(vocab_size: int) -> Fields:
    """With as many words as BERT's tokenizer has, it is that one."""
    return {"empty": (101, 102)} if vocab_size == 30522 else {}


def yaml_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`cond_stage_config` of the original's yaml; ValueError where its code is less general."""
    module = TextTransformer(**fields)
    if (module.num_heads, module.head_dim) != (8, 64) and module.depth:
        raise ValueError(
            f"the original's text transformer has 8 heads of 64, this one {module.num_heads} of "
            f"{module.head_dim}; save it as diffusers"
        )
    params = {
        "n_embed": module.width,
        "n_layer": module.depth,
        "vocab_size": module.vocab_size,
        "max_seq_len": module.max_length,
    }
    return {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of LDMBertModel."""
    if config["encoder_ffn_dim"] != 4 * config["d_model"] or config["activation_function"] != (
        "gelu"
    ):
        raise ValueError(
            f"LDMBertModel with encoder_ffn_dim={config['encoder_ffn_dim']} and "
            f"{config['activation_function']!r}; supported: 4·d_model and 'gelu'"
        )
    return {
        "vocab_size": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "width": config["d_model"],
        "depth": config["encoder_layers"],
        "num_heads": config["encoder_attention_heads"],
        "head_dim": config["head_dim"],
        **_empty(config["vocab_size"]),
    }


def diffusers_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for LDMBertModel."""
    module = TextTransformer(**fields)
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "activation_function": "gelu",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.max_length,
        "d_model": module.width,
        "encoder_layers": module.depth,
        "encoder_ffn_dim": 4 * module.width,
        "encoder_attention_heads": module.num_heads,
        "head_dim": module.head_dim,
        "pad_token_id": 0,
        "dropout": 0.0,
    }
