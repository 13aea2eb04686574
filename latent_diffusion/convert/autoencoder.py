"""The autoencoder's tensor names in files of the original and of diffusers.

Its settings in the original's yaml are here, too; `autoencoder_diffusers` has those of diffusers.
"""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert.settings import Fields, Settings, check_groups
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import Rule, Table, count, inside
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.autoencoder import WITH_CODEBOOK, Autoencoder

_DDCONFIG = Settings(
    names={
        "ch": "channels",
        "ch_mult": "channel_mult",
        "num_res_blocks": "num_res_blocks",
        "attn_resolutions": "attn_resolutions",
        "attn_type": "attn_type",
        "resolution": "resolution",
        "in_channels": "image_channels",
        "z_channels": "z_channels",
        "tanh_out": "tanh_out",
        "dropout": "dropout",
    },
    required={
        "ch": 128,
        "num_res_blocks": 2,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "z_channels": 4,
    },
    defaults={
        "ch_mult": (1, 2, 4, 8),
        "attn_resolutions": (16,),
        "attn_type": "vanilla",
        "tanh_out": False,
        "dropout": 0.0,
        "double_z": True,
    },
    checked={
        "resamp_with_conv": (True,),
        "use_linear_attn": (False,),
        "give_pre_end": (False,),
    },
)
_TRAINING = (  # settings that only training uses, such as names in the data
    "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor",
    "ema_decay", "learn_logvar", "batch_resize_range", "scheduler_config", "lr_g_factor",
    "use_ema", "sane_index_shape", "temperature_scheduler_config", "kl_weight",
)  # fmt: skip
# Settings of the original's classes beside `ddconfig`, by our name of the regularisation.
_CLASSES = {
    "kl": Settings(required={"ddconfig": {}, "embed_dim": 4}, harmless=_TRAINING),
    **dict.fromkeys(
        WITH_CODEBOOK,
        Settings(
            required={"ddconfig": {}, "embed_dim": 4, "n_embed": 8192},
            checked={"remap": (None,)},
            harmless=_TRAINING,
        ),
    ),
}
_TARGETS = {
    "kl": "ldm.models.autoencoder.AutoencoderKL",
    "vq": "ldm.models.autoencoder.VQModelInterface",
    "gumbel": "taming.models.vqgan.GumbelVQ",
}
# Words in the names of the original's classes → our names of the regularisation.
_KINDS = {"AutoencoderKL": "kl", "GumbelVQ": "gumbel", "VQ": "vq"}
_ENDS = (
    Rule("(encoder|decoder)/(conv_in|conv_out)", r"\1.\2", "conv"),
    Rule("(quant_conv|post_quant_conv)", r"\1", "conv"),
)
_CODEBOOK = Rule("quantize", "quantize.embedding", "embedding")
_GUMBEL = (  # of taming's GumbelVQ
    Rule("quantize", "quantize.embed", "embedding"),
    Rule("quantize/proj", "quantize.proj", "linear_2d"),
)


def _res_block(shortcut: str) -> Table:
    return (
        Rule(r"(?P<norm>norm\d)", r"\g<norm>", "norm"),
        Rule(r"(?P<conv>conv\d)", r"\g<conv>", "conv"),
        Rule("nin_shortcut", shortcut, "conv"),
    )


_COMPVIS_ATTENTION = (
    Rule("norm", "norm", "norm"),
    Rule("(?P<map>q|k|v|proj_out|to_qkv|to_out)", r"\g<map>", "linear_2d"),
)
_DIFFUSERS_ATTENTION = (
    Rule("norm", "group_norm", "norm"),
    Rule("(?P<map>q|k|v)", r"to_\g<map>", "linear"),
    Rule("proj_out", "to_out.0", "linear"),
)


def compvis_table(fields: Mapping[str, Any]) -> Table:
    """The original's names: our paths with other punctuation."""
    blocks = [
        (r"(\w+coder)/(down|up)_(\d+)_block_(\d+)", r"\1.\2.\3.block.\4"),
        (r"(\w+coder)/mid_block_(\d)", r"\1.mid.block_\2"),
    ]
    attentions = [
        (r"(\w+coder)/(down|up)_(\d+)_attn_(\d+)", r"\1.\2.\3.attn.\4"),
        (r"(\w+coder)/mid_attn_1", r"\1.mid.attn_1"),
    ]
    codes = _GUMBEL if fields.get("regularization") == "gumbel" else (_CODEBOOK,)
    return [
        *_ENDS,
        *codes,
        Rule(r"(\w+coder)/norm_out", r"\1.norm_out", "norm"),
        Rule(r"(\w+coder)/(down|up)_(\d+)_(\w+sample)_conv", r"\1.\2.\3.\4.conv", "conv"),
        *inside(blocks, _res_block("nin_shortcut")),
        *inside(attentions, _COMPVIS_ATTENTION),
    ]


def diffusers_table(fields: Mapping[str, Any]) -> Table:
    """diffusers' names; the decoder's levels are numbered in the order in which they run."""
    blocks = [(rf"(\w+coder)/mid_block_{i + 1}", rf"\1.mid_block.resnets.{i}") for i in range(2)]
    attentions = [(r"(\w+coder)/mid_attn_1", r"\1.mid_block.attentions.0")]
    samplers = []
    levels = len(fields["channel_mult"])
    for level in range(levels):
        for ours, theirs, side in (
            (f"encoder/down_{level}", f"encoder.down_blocks.{level}", "down"),
            (f"decoder/up_{level}", f"decoder.up_blocks.{levels - 1 - level}", "up"),
        ):
            blocks.append((rf"{ours}_block_(\d+)", rf"{theirs}.resnets.\1"))
            attentions.append((rf"{ours}_attn_(\d+)", rf"{theirs}.attentions.\1"))
            sampler = Rule(f"{ours}_{side}sample_conv", f"{theirs}.{side}samplers.0.conv", "conv")
            samplers.append(sampler)
    return [
        *_ENDS,
        _CODEBOOK,
        *samplers,
        Rule(r"(\w+coder)/norm_out", r"\1.conv_norm_out", "norm"),
        *inside(blocks, _res_block("conv_shortcut")),
        *inside(attentions, _DIFFUSERS_ATTENTION),
    ]


def shapes(fields: Mapping[str, Any]) -> Any:
    """The tree of parameter shapes of an autoencoder with these fields."""
    module = Autoencoder(**fields)
    side = module.downsampling
    return parameter_shapes(module, array(1, side, side, module.image_channels))


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture from the original's tensors (names without prefix)."""
    levels = range(count(tensors, "encoder.down."))
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    z_channels, embed_dim = tensors["post_quant_conv.weight"].shape[:2]
    marks = {"q": "vanilla", "to_qkv": "linear"}  # module of the middle attention → its kind
    kinds = [kind for m, kind in marks.items() if f"encoder.mid.attn_1.{m}.weight" in tensors]
    fields = {
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": count(tensors, "encoder.down.0.block."),
        "attn_resolutions": tuple(
            256 >> i for i in levels if count(tensors, f"encoder.down.{i}.attn.")
        ),
        "attn_type": kinds[0] if kinds else "none",
        "image_channels": image_channels,
        "z_channels": z_channels,
        "embed_dim": embed_dim,
        "regularization": "none",
    }
    for name, kind in (("quantize.embedding.weight", "vq"), ("quantize.embed.weight", "gumbel")):
        if name in tensors:
            return {**fields, "regularization": kind, "num_codes": tensors[name].shape[0]}
    if tensors["encoder.conv_out.weight"].shape[0] == 2 * z_channels:
        fields["regularization"] = "kl"
    return fields


def fields_from_yaml(config: Mapping[str, Any]) -> Fields:
    """Our fields from a `first_stage_config` of the original's yaml.

    Raises ValueError for a class or a setting that our autoencoder can't express.
    """
    name = str(config.get("target", "")).rpartition(".")[2]
    kind = next((kind for word, kind in _KINDS.items() if word in name), None)
    if kind is None:
        raise ValueError(f"first_stage_config.target is {name!r}; known: {', '.join(_KINDS)}")
    params = _CLASSES[kind].complete(config.get("params", {}), name)
    settings = params["ddconfig"]
    fields = {**_DDCONFIG.read(settings, "ddconfig"), "embed_dim": params["embed_dim"]}
    settings = _DDCONFIG.complete(settings, "ddconfig")
    if not fields["channel_mult"]:
        raise ValueError("ddconfig.ch_mult=[]; expected a number for each level")
    if settings["out_ch"] != settings["in_channels"]:
        raise ValueError(
            f"ddconfig.out_ch={settings['out_ch']}; supported: in_channels = "
            f"{settings['in_channels']}"
        )
    if settings["double_z"] != (kind == "kl"):
        raise ValueError(f"ddconfig.double_z={settings['double_z']} in a {name}")
    if fields["attn_type"] == "vanilla-xformers":  # the same in another implementation
        fields["attn_type"] = "vanilla"
    if fields["attn_type"] not in ("vanilla", "linear", "none"):
        raise ValueError(f"ddconfig.attn_type={fields['attn_type']!r}; vanilla, linear or none")
    fields["regularization"] = kind
    return fields if kind == "kl" else {**fields, "num_codes": params["n_embed"]}


def yaml_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `fields_from_yaml`; ValueError where the original has no such autoencoder."""
    module = Autoencoder(**fields)
    check_groups(module)
    if module.regularization not in _TARGETS:
        raise ValueError(f"the original has no autoencoder with {module.regularization!r}")
    check_codes(module)
    kl = module.regularization == "kl"
    settings = {**_DDCONFIG.write(module), "double_z": kl, "out_ch": module.image_channels}
    params = {
        "embed_dim": module.embed_dim,
        "ddconfig": settings,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    if not kl:
        params["n_embed"] = module.num_codes
    return {"target": _TARGETS[module.regularization], "params": params}


def check_codes(module: Autoencoder) -> None:
    """Raise ValueError for a codebook whose look-up other libraries would compute differently."""
    if module.regularization == "vq" and module.codebook_l2:
        raise ValueError(
            "this format has no codes on the unit sphere (codebook_l2); save it as orbax"
        )
