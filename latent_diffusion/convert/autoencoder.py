"""The autoencoder's names, shapes and settings in the original's files and in diffusers'."""

from collections.abc import Mapping
from typing import Any

import jax

from latent_diffusion.convert.tables import Rule, Table, inside
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.autoencoder import Autoencoder

Fields = dict[str, Any]

_ENDS = (
    Rule("(encoder|decoder)/(conv_in|conv_out)", r"\1.\2", "conv"),
    Rule("(quant_conv|post_quant_conv)", r"\1", "conv"),
    Rule("quantize", "quantize.embedding", "embedding"),
)


def _res_block(shortcut: str) -> Table:
    return (
        Rule("norm1", "norm1", "norm"),
        Rule("conv1", "conv1", "conv"),
        Rule("norm2", "norm2", "norm"),
        Rule("conv2", "conv2", "conv"),
        Rule("nin_shortcut", shortcut, "conv"),
    )


_COMPVIS_ATTENTION = (
    Rule("norm", "norm", "norm"),
    *(Rule(name, name, "linear_2d") for name in ("q", "k", "v", "proj_out", "to_qkv", "to_out")),
)
_DIFFUSERS_ATTENTION = (
    Rule("norm", "group_norm", "norm"),
    Rule("q", "to_q", "linear"),
    Rule("k", "to_k", "linear"),
    Rule("v", "to_v", "linear"),
    Rule("proj_out", "to_out.0", "linear"),
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file that diffusers wrote, if before version 0.18 by today's names."""

    def new(name: str) -> str:
        *module, last, leaf = name.split(".")
        return ".".join([*module, _OLD_ATTENTION.get(last, last), leaf])

    return {new(name): tensor for name, tensor in tensors.items()}


def compvis_table(fields: Mapping[str, Any]) -> Table:
    """Our paths are the original's names with other punctuation."""
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
    """diffusers counts the decoder's levels in the order in which they run."""
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
    levels = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.down."))
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = [
        tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
    ]
    attention = "vanilla" if "encoder.mid.attn_1.q.weight" in tensors else "none"
    if "encoder.mid.attn_1.to_qkv.weight" in tensors:
        attention = "linear"
    z_channels, embed_dim = tensors["post_quant_conv.weight"].shape[:2]
    with_attention = {int(n.split(".")[2]) for n in tensors if ".attn." in n and ".down." in n}
    fields = {
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": len(
            {n.split(".")[4] for n in tensors if n.startswith("encoder.down.0.block.")}
        ),
        "attn_resolutions": tuple(256 >> level for level in sorted(with_attention)),
        "attn_type": attention,
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
    own = params["ddconfig"]
    fields = {
        "channels": own["ch"],
        "channel_mult": tuple(own["ch_mult"]),
        "num_res_blocks": own["num_res_blocks"],
        "attn_resolutions": tuple(own.get("attn_resolutions", ())),
        "attn_type": own.get("attn_type", "vanilla"),
        "resolution": own["resolution"],
        "image_channels": own["in_channels"],
        "z_channels": own["z_channels"],
        "embed_dim": params["embed_dim"],
        "tanh_out": own.get("tanh_out", False),
        "regularization": "kl" if own["double_z"] else "vq",
    }
    return {**fields, "num_codes": params["n_embed"]} if "n_embed" in params else fields


def yaml_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `fields_from_yaml`, with a class; ValueError where the original has none."""
    module = Autoencoder(**fields)
    if module.num_groups != 32:
        raise ValueError(
            f"the original's code has 32 groups in every norm, this model {module.num_groups}; "
            "save it as diffusers"
        )
    if module.regularization not in ("kl", "vq"):
        raise ValueError(f"the original has no autoencoder with {module.regularization!r}")
    kl = module.regularization == "kl"
    own = {
        "double_z": kl,
        "z_channels": module.z_channels,
        "resolution": module.resolution,
        "in_channels": module.image_channels,
        "out_ch": module.image_channels,
        "ch": module.channels,
        "ch_mult": list(module.channel_mult),
        "num_res_blocks": module.num_res_blocks,
        "attn_resolutions": list(module.attn_resolutions),
        "dropout": module.dropout,
    }
    if module.attn_type != "vanilla":
        own["attn_type"] = module.attn_type
    if module.tanh_out:
        own["tanh_out"] = True
    params = {"embed_dim": module.embed_dim, "ddconfig": own}
    loss = {"lossconfig": {"target": "torch.nn.Identity"}}
    if kl:
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {**params, **loss}}
    params = {**params, "n_embed": module.num_codes, **loss}
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of AutoencoderKL or VQModel."""
    widths = list(config["block_out_channels"])
    _expect(config, "act_fn", ("silu", "swish"))
    _expect(config, "norm_type", ("group",))
    _expect(config, "use_quant_conv", (True,))
    _expect(config, "use_post_quant_conv", (True,))
    downs, ups = config["down_block_types"], config["up_block_types"]
    attention = [kind.startswith("Attn") for kind in downs]
    if attention != [kind.startswith("Attn") for kind in ups][::-1]:
        raise ValueError(f"encoder {downs} and decoder {ups} attend at different levels")
    # diffusers has no resolution for which a level attends, it names the levels.
    resolution = max(256, 2 ** (len(widths) - 1))
    fields = {
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": tuple(resolution >> i for i, yes in enumerate(attention) if yes),
        "attn_type": "vanilla" if config.get("mid_block_add_attention", True) else "none",
        "resolution": resolution,
        "num_groups": config["norm_num_groups"],
        "image_channels": config["in_channels"],
        "z_channels": config["latent_channels"],
        "embed_dim": config["latent_channels"],
        "regularization": "kl",
    }
    if config["_class_name"] == "VQModel":
        codes, width = config["num_vq_embeddings"], config.get("vq_embed_dim")
        fields.update(regularization="vq", num_codes=codes)
        fields["embed_dim"] = width or fields["z_channels"]
    return fields


def diffusers_from_fields(fields: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """A config.json for AutoencoderKL or VQModel; ValueError where they can't express the model."""
    module = Autoencoder(**fields)
    vq, levels = module.regularization == "vq", range(len(module.channel_mult))
    known = module.regularization in ("kl", "vq") and module.attn_type != "linear"
    if not known or module.tanh_out:
        raise ValueError(
            "diffusers has autoencoders with regularization kl or vq, attn_type vanilla or none, "
            f"no tanh_out, not {module.regularization!r}, {module.attn_type!r}, {module.tanh_out}"
        )
    if not vq and module.embed_dim != module.z_channels:
        raise ValueError(
            f"diffusers' AutoencoderKL needs embed_dim = z_channels, this one has "
            f"{module.embed_dim} and {module.z_channels}"
        )
    attends = [module.resolution >> i in module.attn_resolutions for i in levels]
    config = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [mult * module.channels for mult in module.channel_mult],
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in attends[::-1]],
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "latent_channels": module.z_channels,
        "layers_per_block": module.num_res_blocks,
        "mid_block_add_attention": module.attn_type != "none",
        "norm_num_groups": module.num_groups,
        "sample_size": image_size,
    }
    if vq:
        config.update(num_vq_embeddings=module.num_codes, vq_embed_dim=module.embed_dim)
    return config


def _expect(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    if config.get(name, allowed[0]) not in allowed:
        raise ValueError(f"{config['_class_name']}.{name}={config[name]!r}; supported: {allowed}")
