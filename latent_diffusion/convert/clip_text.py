"""CLIP's text encoder: its names, shapes and settings in transformers' and OpenCLIP's words."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from latent_diffusion.convert.bundle import Part
from latent_diffusion.convert.tables import (
    LINEAR,
    SAME,
    Kind,
    Leaf,
    Rule,
    Table,
    inside,
    joint_qkv,
    write_tensors,
)
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.clip import ACTIVATIONS
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.types import lookup

Fields = dict[str, Any]

LAYER = r"layers_(?P<i>\d+)"
_POSITIONS = "embeddings.position_embedding.weight"
_STACKED: Kind = (
    Leaf("kernel", (".in_proj_weight",), LINEAR),
    Leaf("bias", (".in_proj_bias",), SAME),
)


def transformers_layers(theirs: str, num_heads: int) -> list[Rule]:
    """A layer of any encoder of CLIP in transformers' names. theirs: may say `\\g<i>`."""
    qkv = joint_qkv(("q_proj", "k_proj", "v_proj"), num_heads, interleaved=False)
    return inside(
        [(LAYER, theirs)],
        (
            Rule("self_attn/qkv", "self_attn", qkv),
            Rule("self_attn/out_proj", "self_attn.out_proj", "linear"),
            Rule(r"(?P<name>layer_norm\d)", r"\g<name>", "norm"),
            Rule(r"(?P<name>fc\d)", r"mlp.\g<name>", "linear"),
        ),
    )


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """CLIPTextModel's names, which Stable Diffusion 1 has in its single files, too.

    Without the `text_model.` that most files begin them with; see `below`.
    """
    return (
        Rule("", "", (Leaf("position_embedding", (_POSITIONS,), SAME),)),
        Rule("token_embedding", "embeddings.token_embedding", "embedding"),
        Rule("final_layer_norm", "final_layer_norm", "norm"),
        *transformers_layers(r"encoder.layers.\g<i>", ClipText(**fields).num_heads),
    )


def open_clip_layers() -> list[Rule]:
    """A layer of any encoder of CLIP in OpenCLIP's (and OpenAI's) names."""
    layer = (
        Rule("self_attn/qkv", "attn", _STACKED),
        Rule("self_attn/out_proj", "attn.out_proj", "linear"),
        Rule(r"layer_norm(?P<n>\d)", r"ln_\g<n>", "norm"),
        Rule("fc1", "mlp.c_fc", "linear"),
        Rule("fc2", "mlp.c_proj", "linear"),
    )
    return inside([(LAYER, r"transformer.resblocks.\g<i>")], layer)


def open_clip_table(fields: Mapping[str, Any]) -> Table:
    """OpenCLIP's names, which Stable Diffusion 2 has in its single files."""
    return (
        Rule("", "", (Leaf("position_embedding", ("positional_embedding",), SAME),)),
        Rule("token_embedding", "token_embedding", "embedding"),
        Rule("final_layer_norm", "ln_final", "norm"),
        *open_clip_layers(),
    )


def unused(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left over: contrastive ends, constant buffers, and skipped layers."""
    module = ClipText(**fields)
    skipped = range(module.depth - module.skip_last, module.depth)
    return (
        r"embeddings\.position_ids",
        r"text_projection(\.weight)?",
        "logit_scale",
        "attn_mask",
        r"visual\..*",
        *(rf"(encoder\.layers|transformer\.resblocks)\.{i}\..*" for i in skipped),
    )


def shapes(fields: Mapping[str, Any]) -> Any:
    """The tree of parameter shapes of an encoder with these fields."""
    module = ClipText(**fields)
    batch = {"tokens": jax.ShapeDtypeStruct((1, module.max_length), "int32")}
    drop = jax.ShapeDtypeStruct((1,), bool)
    return jax.eval_shape(module.init, jax.random.key(0), batch, drop)["params"]


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of CLIPTextModel, or of a whole CLIPModel.

    What it says of special tokens is wrong in most files; `text.with_tokenizer` knows.
    """
    config = {**config, **config.get("text_config", {})}
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"CLIPTextModel.layer_norm_eps={config['layer_norm_eps']}; supported 1e-5")
    width, activation = config["hidden_size"], config.get("hidden_act", "quick_gelu")
    lookup(ACTIVATIONS, activation, "CLIPTextModel.hidden_act")
    return {
        **_ids(config["vocab_size"]),
        "vocab_size": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "width": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_width": _unless_default(config["intermediate_size"], width),
        "activation": activation,
    }


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for CLIPTextModel; layers that are skipped aren't there."""
    module = ClipText(**fields)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.max_length,
        "hidden_size": module.width,
        "num_hidden_layers": module.depth - module.skip_last,
        "num_attention_heads": module.num_heads,
        "intermediate_size": module.mlp_width or 4 * module.width,
        "hidden_act": module.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": module.empty[0],
        "eos_token_id": module.empty[1],
        "pad_token_id": module.pad_id,
        "projection_dim": module.width,
    }


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Read the architecture off tensors in either spelling, without prefix.

    Heads are always 64 wide. OpenCLIP's are taken as Stable Diffusion 2 takes them: penultimate
    layer, exact GELU, padding with 0; transformers' as Stable Diffusion 1 does.
    """
    is_open_clip = "positional_embedding" in tensors
    if is_open_clip:
        token, position = "token_embedding.weight", "positional_embedding"
        layers, inner = "transformer.resblocks.", "mlp.c_fc.weight"
        own = {"skip_last": 1, "activation": "gelu", "pad_id": 0}
    else:
        token, position = "embeddings.token_embedding.weight", _POSITIONS
        layers, inner = "encoder.layers.", "mlp.fc1.weight"
        own = {}
    vocab_size, width = tensors[token].shape
    depth = len({n.split(".")[layers.count(".")] for n in tensors if n.startswith(layers)})
    return {
        **_ids(vocab_size),
        "vocab_size": vocab_size,
        "max_length": tensors[position].shape[0],
        "width": width,
        "depth": depth,
        "num_heads": width // 64,
        "mlp_width": _unless_default(tensors[f"{layers}0.{inner}"].shape[0], width),
        **own,
    }


def _ids(vocab_size: int) -> Fields:
    """CLIP's special tokens are the last two of the vocabulary."""
    return {"empty": (vocab_size - 2, vocab_size - 1), "pad_id": vocab_size - 1}


def _unless_default(mlp_width: int, width: int) -> int | None:
    return None if mlp_width == 4 * width else mlp_width


def transformers_tensors(part: Part) -> dict[str, Tensor]:
    """Under transformers' names, with what else its file had."""
    kept = {n: t for n, t in part.unused.items() if n.startswith(("embeddings.", "encoder."))}
    return {**write_tensors(transformers_table(part.fields), part.params), **kept}


def open_clip_tensors(part: Part) -> dict[str, Tensor]:
    """Under OpenCLIP's names, with what else its file had: zeros where it was none of its files.

    Stable Diffusion 2 skips the last layer, which transformers' files therefore don't have.
    """
    tensors = write_tensors(open_clip_table(part.fields), part.params)
    module, dtype = ClipText(**part.fields), next(iter(part.params.values())).dtype
    layers = module.depth - module.skip_last
    last, first = (f"transformer.resblocks.{i}." for i in (layers, 0))
    wanted = {n.replace(first, last): t.shape for n, t in tensors.items() if n.startswith(first)}
    wanted |= {"text_projection": (module.width, module.width), "logit_scale": ()}
    zeros = {name: in_memory(np.zeros(shape, dtype)) for name, shape in wanted.items()}
    kept = {n: t for n, t in part.unused.items() if n in wanted or n == "attn_mask"}
    return {**tensors, **zeros, **kept}
