"""The autoencoder's names and settings in the original's files and in diffusers'."""

from collections.abc import Mapping
from typing import Any

import jax

from latent_diffusion.convert.settings import Fields, Settings, check_groups
from latent_diffusion.convert.tables import Rule, Table, count, inside
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.autoencoder import Autoencoder

_YAML = Settings(  # `ddconfig` of the original
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
    defaults={"attn_resolutions": (), "attn_type": "vanilla", "tanh_out": False, "dropout": 0.0},
)
_CONFIG = Settings(  # of diffusers
    names={
        "layers_per_block": "num_res_blocks",
        "norm_num_groups": "num_groups",
        "in_channels": "image_channels",
        "latent_channels": "z_channels",
    },
    allowed={"act_fn": ("silu", "swish")},
    checked={"norm_type": ("group",), "use_quant_conv": (True,), "use_post_quant_conv": (True,)},
)
_ENDS = (
    Rule("(encoder|decoder)/(conv_in|conv_out)", r"\1.\2", "conv"),
    Rule("(quant_conv|post_quant_conv)", r"\1", "conv"),
    Rule("quantize", "quantize.embedding", "embedding"),
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
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file of diffusers by today's names; versions before 0.18 had others."""

    def new(name: str) -> str:
        *module, last, leaf = name.split(".")
        return ".".join([*module, _OLD_ATTENTION.get(last, last), leaf])

    return {new(name): tensor for name, tensor in tensors.items()}


def compvis_table(fields: Mapping[str, Any]) -> Table:
    """The original's names, which are our paths with other punctuation."""
    blocks = [
        (r"(\w+coder)/(down|up)_(\d+)_block_(\d+)", r"\1.\2.\3.block.\4"),
        (r"(\w+coder)/mid_block_(\d)", r"\1.mid.block_\2"),
    ]
    attentions = [
        (r"(\w+coder)/(down|up)_(\d+)_attn_(\d+)", r"\1.\2.\3.attn.\4"),
        (r"(\w+coder)/mid_attn_1", r"\1.mid.attn_1"),
    ]
    return [
        *_ENDS,
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
        *samplers,
        Rule(r"(\w+coder)/norm_out", r"\1.conv_norm_out", "norm"),
        *inside(blocks, _res_block("conv_shortcut")),
        *inside(attentions, _DIFFUSERS_ATTENTION),
    ]


def shapes(fields: Mapping[str, Any]) -> Any:
    """The tree of parameter shapes of an autoencoder with these fields."""
    module = Autoencoder(**fields)
    side = module.downsampling
    image = jax.ShapeDtypeStruct((1, side, side, module.image_channels), "float32")
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Read the architecture off the original's tensors (names without prefix)."""
    levels = range(count(tensors, "encoder.down."))
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    z_channels, embed_dim = tensors["post_quant_conv.weight"].shape[:2]
    marks = {"q": "vanilla", "to_qkv": "linear"}  # a module of the middle attention by its kind
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
    if "quantize.embedding.weight" in tensors:
        codes = tensors["quantize.embedding.weight"].shape[0]
        return {**fields, "regularization": "vq", "num_codes": codes}
    if tensors["encoder.conv_out.weight"].shape[0] == 2 * z_channels:
        fields["regularization"] = "kl"
    return fields


def fields_from_yaml(params: Mapping[str, Any]) -> Fields:
    """Our fields from `first_stage_config.params` of the original's yaml."""
    settings = params["ddconfig"]
    fields = {**_YAML.read(settings, "ddconfig"), "embed_dim": params["embed_dim"]}
    fields["regularization"] = "kl" if settings["double_z"] else "vq"
    return {**fields, "num_codes": params["n_embed"]} if "n_embed" in params else fields


def yaml_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `fields_from_yaml`, with a class; ValueError where the original has none."""
    module = Autoencoder(**fields)
    check_groups(module)
    if module.regularization not in ("kl", "vq"):
        raise ValueError(f"the original has no autoencoder with {module.regularization!r}")
    kl = module.regularization == "kl"
    settings = {**_YAML.write(module), "double_z": kl, "out_ch": module.image_channels}
    params = {
        "embed_dim": module.embed_dim,
        "ddconfig": settings,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    if kl:
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    params["n_embed"] = module.num_codes
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of AutoencoderKL or VQModel.

    Raises ValueError for a setting that our autoencoder can't express.
    """
    name, widths = config["_class_name"], list(config["block_out_channels"])
    fields = _CONFIG.read(config, name)
    downs, ups = config["down_block_types"], config["up_block_types"]
    attention = [kind.startswith("Attn") for kind in downs]
    if attention != [kind.startswith("Attn") for kind in ups][::-1]:
        raise ValueError(f"encoder {downs} and decoder {ups} attend at different levels")
    # diffusers names the levels that attend; ours are named by the resolution of the image there.
    resolution = max(256, 2 ** (len(widths) - 1))
    fields |= {
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "attn_resolutions": tuple(resolution >> i for i, yes in enumerate(attention) if yes),
        "attn_type": "vanilla" if config.get("mid_block_add_attention", True) else "none",
        "resolution": resolution,
        "embed_dim": fields["z_channels"],
        "regularization": "kl",
    }
    if name == "VQModel":
        width = config.get("vq_embed_dim") or fields["z_channels"]
        codes = {"num_codes": config["num_vq_embeddings"], "embed_dim": width}
        return {**fields, **codes, "regularization": "vq"}
    return fields


def diffusers_from_fields(fields: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """A config.json for AutoencoderKL or VQModel; ValueError where they can't express the model."""
    module = Autoencoder(**fields)
    vq, levels = module.regularization == "vq", range(len(module.channel_mult))
    expressible = module.regularization in ("kl", "vq") and module.attn_type != "linear"
    if not expressible or module.tanh_out:
        raise ValueError(
            "diffusers has autoencoders with regularization kl or vq, attn_type vanilla or none, "
            f"no tanh_out, not {module.regularization!r}, {module.attn_type!r}, {module.tanh_out}"
        )
    if not vq and module.embed_dim != module.z_channels:
        raise ValueError(
            "diffusers' AutoencoderKL needs embed_dim = z_channels, this model has "
            f"{module.embed_dim} and {module.z_channels}"
        )
    attends = [module.resolution >> i in module.attn_resolutions for i in levels]
    config = {
        **_CONFIG.write(module),
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "block_out_channels": [mult * module.channels for mult in module.channel_mult],
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in attends[::-1]],
        "out_channels": module.image_channels,
        "mid_block_add_attention": module.attn_type != "none",
        "sample_size": image_size,
    }
    if vq:
        config |= {"num_vq_embeddings": module.num_codes, "vq_embed_dim": module.embed_dim}
    return config
