"""CLIP's text encoder: its tensor names and settings in transformers and in OpenCLIP."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from latent_diffusion.convert import tables
from latent_diffusion.convert.bundle import Part, conditioner_shapes
from latent_diffusion.convert.settings import (
    GENERAL,
    Fields,
    Settings,
    encoder_settings,
    usual_mlp,
)
from latent_diffusion.convert.tables import LINEAR, SAME, Leaf, Rule, Table, count, inside
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.conditioners.clip_text import ClipText

shapes = partial(conditioner_shapes, "clip_text")
_read_config, _write_config = encoder_settings(
    ClipText,
    "CLIPTextModel",
    "clip_text_model",
    names={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_length",
        "hidden_act": "activation",
    },
    defaults={
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
    },
    allowed={"layer_norm_eps": (1e-5,), "hidden_act": ("quick_gelu", "gelu")},
    # Only the pooled embedding needs these; pipelines that use it set its fields.
    harmless=("projection_dim", "pad_token_id", "is_decoder", "add_cross_attention"),
)
WHOLE = Settings(  # those of a CLIPModel, whose config has the configs of both encoders
    optional={f"{half}_config{end}": {} for half in ("text", "vision") for end in ("", "_dict")},
    defaults={"projection_dim": 512},
    harmless={*GENERAL, "logit_scale_init_value"},
)
LAYER = r"layers_(?P<i>\d+)"
TRANSFORMERS, OPEN_CLIP = "encoder.layers.", "transformer.resblocks."
PROJECTION = "text_projection.weight"  # of the pooled output; it has a prefix in no file
_POSITIONS = "embeddings.position_embedding.weight"
_STACKED = (
    Leaf("kernel", (".in_proj_weight",), LINEAR),
    Leaf("bias", (".in_proj_bias",), SAME),
)


def transformers_layers(theirs: str, num_heads: int) -> list[Rule]:
    """The layers of either encoder of CLIP in transformers' names.

    theirs: the prefix of a layer's names, in which `\\g<i>` is the layer's number.
    """
    qkv = tables.joint_qkv(("q_proj", "k_proj", "v_proj"), num_heads, interleaved=False)
    layer = (
        Rule("self_attn/qkv", "self_attn", qkv),
        Rule("self_attn/out_proj", "self_attn.out_proj", "linear"),
        Rule(r"(?P<name>layer_norm\d)", r"\g<name>", "norm"),
        Rule(r"(?P<name>fc\d)", r"mlp.\g<name>", "linear"),
    )
    return inside([(LAYER, theirs)], layer)


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """CLIPTextModel's names, which the single files of Stable Diffusion 1 have, too.

    They lack the prefix `text_model.` that all but the projection have in most files.
    """
    return (
        Rule("", "", (Leaf("position_embedding", (_POSITIONS,), SAME),)),
        Rule("token_embedding", "embeddings.token_embedding", "embedding"),
        Rule("final_layer_norm", "final_layer_norm", "norm"),
        Rule("text_projection", "text_projection", "linear"),
        *transformers_layers(rf"{TRANSFORMERS}\g<i>", ClipText(**fields).num_heads),
    )


def open_clip_layers() -> list[Rule]:
    """The layers of either encoder of CLIP in OpenCLIP's (and OpenAI's) names."""
    layer = (
        Rule("self_attn/qkv", "attn", _STACKED),
        Rule("self_attn/out_proj", "attn.out_proj", "linear"),
        Rule(r"layer_norm(?P<n>\d)", r"ln_\g<n>", "norm"),
        Rule("fc1", "mlp.c_fc", "linear"),
        Rule("fc2", "mlp.c_proj", "linear"),
    )
    return inside([(LAYER, rf"{OPEN_CLIP}\g<i>")], layer)


def open_clip_table(fields: Mapping[str, Any]) -> Table:
    """OpenCLIP's names, which the single files of Stable Diffusion 2 have."""
    return (
        Rule("", "", (Leaf("position_embedding", ("positional_embedding",), SAME),)),
        Rule("token_embedding", "token_embedding", "embedding"),
        Rule("final_layer_norm", "ln_final", "norm"),
        Rule("text_projection", "", (Leaf("kernel", ("text_projection",), SAME),)),
        *open_clip_layers(),
    )


def unused(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left over: CLIP's other parts, constant buffers and skipped layers."""
    module = ClipText(**fields)
    buffers = (r"embeddings\.position_ids", "logit_scale", "attn_mask", r"visual\..*")
    if module.projection_dim is not None:
        return buffers
    skipped = range(module.depth - module.skip_last, module.depth)
    norm = () if module.final_norm else (r"(final_layer_norm|ln_final)\..*",)
    return (
        *buffers,
        *norm,
        PROJECTION,
        "text_projection",
        *(rf"(encoder\.layers|transformer\.resblocks)\.{i}\..*" for i in skipped),
    )


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of CLIPTextModel, or of a whole CLIPModel.

    Most configs have wrong special tokens, so these are inferred from the size of the vocabulary;
    a tokenizer corrects them (`text.with_tokenizer`).
    """
    fields = _read_config(half_of(config, "text_config"))
    return {**_special_tokens(fields["vocab_size"]), **fields}


def half_of(config: Mapping[str, Any], half: str) -> Mapping[str, Any]:
    """The config of one encoder, which may be inside that of a whole CLIPModel."""
    if half not in config:
        return config
    whole = WHOLE.complete(config, "CLIPModel")
    return {**(whole[half] or {}), **(whole[f"{half}_dict"] or {})}


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for CLIPTextModel, without the layers that the encoder skips.

    Without a final norm, the skipped layers stay: readers take the hidden states before them.
    """
    module = ClipText(**fields)
    projected = module.projection_dim is not None
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return {
        **_write_config(fields),
        "architectures": [name],
        "num_hidden_layers": module.depth - (module.skip_last if module.final_norm else 0),
        "bos_token_id": module.empty[0],
        "eos_token_id": module.empty[1],
        "pad_token_id": module.pad_id,
        "projection_dim": module.projection_dim or module.width,
    }


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture from tensors under OpenCLIP's or transformers' names, without prefix.

    A head has 64 channels. OpenCLIP's encoder is used as in Stable Diffusion 2: the states of the
    last layer but one, exact GELU, padding with 0; transformers' is used as in Stable Diffusion 1.
    """
    token, position = "embeddings.token_embedding.weight", _POSITIONS
    layers, inner, usage = TRANSFORMERS, "mlp.fc1.weight", {}
    if "positional_embedding" in tensors:
        token, position = "token_embedding.weight", "positional_embedding"
        layers, inner = OPEN_CLIP, "mlp.c_fc.weight"
        usage = {"skip_last": 1, "activation": "gelu", "pad_id": 0}
    vocab_size, width = tensors[token].shape
    fields = {
        **_special_tokens(vocab_size),
        "vocab_size": vocab_size,
        "max_length": tensors[position].shape[0],
        "width": width,
        "depth": count(tensors, layers),
        "num_heads": width // 64,
        "mlp_width": tensors[f"{layers}0.{inner}"].shape[0],
        **usage,
    }
    return usual_mlp(fields)


def _special_tokens(vocab_size: int) -> Fields:
    """CLIP's special tokens, which are the last two of the vocabulary."""
    return {"empty": (vocab_size - 2, vocab_size - 1), "pad_id": vocab_size - 1}


def transformers_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of an encoder's file under transformers' names, with the part's unused ones.

    Skipped layers and a norm, which the file must have, are zeros where the part lacks them.
    """
    begins = ("embeddings.", "encoder.", "final_layer_norm.")
    unused = {n: t for n, t in part.unused.items() if n.startswith(begins)}
    tensors = tables.write_tensors(transformers_table(part.fields), part.params)
    module = ClipText(**part.fields)
    if not module.final_norm and module.projection_dim is None:
        seen = module.depth - module.skip_last
        norms = {end: f"{TRANSFORMERS}0.layer_norm1.{end}" for end in ("weight", "bias")}
        required = {f"final_layer_norm.{end}": tensors[name] for end, name in norms.items()}
        required |= _like_first(tensors, TRANSFORMERS, range(seen, module.depth))
        tensors = _zeros(required) | tensors
    return tensors | unused


def _like_first(
    tensors: Mapping[str, Tensor], layers: str, indices: Iterable[int]
) -> dict[str, Tensor]:
    """The names of the layers `indices`, with the tensors of layer 0."""
    first = f"{layers}0."
    names = [name for name in tensors if name.startswith(first)]
    return {n.replace(first, f"{layers}{i}."): tensors[n] for i in indices for n in names}


def _zeros(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: in_memory(np.zeros(t.shape, t.dtype)) for name, t in like.items()}


def open_clip_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of a file under OpenCLIP's names, with the unused ones that OpenCLIP requires.

    Stable Diffusion 2 skips the last layer, so that transformers' files lack it: required tensors
    that the file that was read lacks are zeros.
    """
    tensors = tables.write_tensors(open_clip_table(part.fields), part.params)
    module, some = ClipText(**part.fields), next(iter(part.params.values()))
    required = {"logit_scale": replace(some, shape=())}
    if module.projection_dim is None:
        seen = module.depth - module.skip_last
        required |= _like_first(tensors, OPEN_CLIP, [seen])
        required["text_projection"] = replace(some, shape=(module.width, module.width))
    unused = {n: t for n, t in part.unused.items() if n in required or n == "attn_mask"}
    return {**tensors, **_zeros(required), **unused}
