"""T5's encoder: its tensor names and settings in transformers."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert.bundle import Part
from latent_diffusion.convert.settings import GENERAL, Fields, Settings
from latent_diffusion.convert.tables import SAME, Leaf, Rule, Table, inside, write_tensors
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.conditioners.t5_text import T5Text

NAME = "T5EncoderModel"
_COPY = "encoder.embed_tokens.weight"  # a copy of the token embeddings, in some files
_BLOCK = (r"layers_(?P<i>\d+)", r"encoder.block.\g<i>.layer")
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_SETTINGS = Settings(
    names={
        "vocab_size": "vocab_size",
        "d_model": "width",
        "num_layers": "depth",
        "num_heads": "num_heads",
        "d_kv": "head_dim",
        "d_ff": "mlp_width",
        "relative_attention_num_buckets": "buckets",
        "relative_attention_max_distance": "max_distance",
        "layer_norm_epsilon": "epsilon",
    },
    defaults={
        "vocab_size": 32128,
        "d_model": 512,
        "num_layers": 6,
        "num_heads": 8,
        "d_kv": 64,
        "d_ff": 2048,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    checked={"dense_act_fn": ("gelu_new",), "is_gated_act": (True,), "is_decoder": (False,)},
    harmless=GENERAL.union(
        ("num_decoder_layers", "dropout_rate", "n_positions", "output_past", "pad_token_id",
         "eos_token_id", "add_cross_attention", "scale_decoder_outputs")
    ),
)  # fmt: skip


def transformers_table(fields: Mapping[str, Any]) -> Table:
    """T5EncoderModel's names."""
    layer = (
        Rule("(?P<m>q|k|v|o)", r"0.SelfAttention.\g<m>", "linear"),
        Rule("(?P<m>wi_0|wi_1|wo)", r"1.DenseReluDense.\g<m>", "linear"),
        Rule(r"layer_norm_(?P<n>\d)", r"\g<n>.layer_norm", "norm"),
    )
    return [
        Rule("shared", "shared", "embedding"),
        Rule("", "", (Leaf("relative_attention_bias", (_BIAS,), SAME),)),
        *inside([_BLOCK], layer),
        Rule("final_layer_norm", "encoder.final_layer_norm", "norm"),
    ]


def unused(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left over: a copy of token embeddings, and other parts of a whole T5."""
    return (_COPY.replace(".", r"\."), r"decoder\..*", r"lm_head\.weight", r"logit_scale")


def fields_from_config(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of T5EncoderModel."""
    kind = config.get("feed_forward_proj", "relu")
    if kind != "gated-gelu":
        raise ValueError(f"{NAME}.feed_forward_proj={kind!r}; supported: 'gated-gelu'")
    return _SETTINGS.read(config, NAME)


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for T5EncoderModel."""
    module = T5Text(**fields)
    return {
        **_SETTINGS.write(module),
        "architectures": [NAME],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": module.pad_id,
        "eos_token_id": module.empty[0],
        "tie_word_embeddings": False,
    }


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture from the tensors, whose names have no prefix."""
    (vocab_size, width), (buckets, heads) = tensors["shared.weight"].shape, tensors[_BIAS].shape
    block = "encoder.block.0.layer"
    depth = sum(name.endswith("layer.0.SelfAttention.q.weight") for name in tensors)
    return {
        "vocab_size": vocab_size,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "head_dim": tensors[f"{block}.0.SelfAttention.q.weight"].shape[0] // heads,
        "mlp_width": tensors[f"{block}.1.DenseReluDense.wi_0.weight"].shape[0],
        "buckets": buckets,
    }


def transformers_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of an encoder's file, with the copy of token embeddings where the file had it."""
    copy = {_COPY: part.params["shared/embedding"]} if _COPY in part.unused else {}
    return write_tensors(transformers_table(part.fields), part.params) | copy
