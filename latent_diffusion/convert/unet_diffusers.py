"""The U-Net's settings as diffusers has them: a config.json, read and written."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert import unet
from latent_diffusion.nets.unet import UNet

Fields = dict[str, Any]

_FIXED = {  # settings of diffusers' that our U-Net has one value of
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "add_attention": True,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "time_cond_proj_dim": None,
    "cross_attention_norm": None,
    "attention_type": "default",
    "mid_block_only_cross_attention": None,
    "reverse_transformer_layers_per_block": None,
}


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of UNet2DModel or UNet2DConditionModel."""
    name, widths = config["_class_name"], list(config["block_out_channels"])
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{name}.{key}={config[key]!r}; supported: {value!r}")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ValueError(f"{name}.act_fn={config['act_fn']!r}; supported: silu")
    if (embed_type := config.get("class_embed_type")) not in (None, "projection"):
        raise ValueError(f"{name}.class_embed_type={embed_type!r}; supported: None, 'projection'")
    kinds = config["down_block_types"]
    attends = ["Attn" in kind for kind in kinds]
    resample = [k.startswith("Resnet") for k in kinds] + [config.get("downsample_type") == "resnet"]
    fields = {
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": _single(config, "layers_per_block"),
        "attention_resolutions": tuple(2**i for i, yes in enumerate(attends) if yes),
        "use_scale_shift_norm": config.get("resnet_time_scale_shift") == "scale_shift",
        "resblock_updown": any(resample),
        "num_groups": config["norm_num_groups"],
        "dropout": config.get("dropout", 0.0),
        "vector_projection": embed_type == "projection",
    }
    heads: Any = config.get("attention_head_dim")
    if name == "UNet2DModel":
        _check_middle_norm(config, fields["use_scale_shift_norm"])
        # One head where nothing is said; else the width of a head.
        own = {"num_heads": 1} if heads is None else {"num_head_channels": heads}
        return {**fields, "transformer_depth": 0, **own}
    fields["transformer_depth"] = _single(config, "transformer_layers_per_block", 1)
    crossed = config.get("only_cross_attention", False)
    if crossed and any(crossed if isinstance(crossed, list | tuple) else [crossed]):
        each = crossed if isinstance(crossed, list | tuple) else [crossed] * len(widths)
        fields["disable_self_attentions"] = tuple(each)
    # Under the name of a head's width diffusers keeps the number of heads.
    if isinstance(heads, int) or len(set(heads)) == 1:
        return {**fields, "num_heads": heads if isinstance(heads, int) else heads[0]}
    head_channels = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(head_channels) != 1:
        raise ValueError(f"{name}.attention_head_dim={heads}: heads of different widths")
    return {**fields, "num_head_channels": head_channels.pop()}


def _check_middle_norm(config: Mapping[str, Any], scale_shift: bool) -> None:
    """The attention in the middle has a norm like the others', unless diffusers leaves it out."""
    groups = config["norm_num_groups"]
    given = config.get("attn_norm_num_groups") or (None if scale_shift else groups)
    if given != groups:
        raise ValueError(
            f"UNet2DModel.attn_norm_num_groups={given} with {groups} groups in other norms; "
            f"supported: {groups}"
        )


def _single(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ValueError(f"{config['_class_name']}.{key}={value}; supported: one for all")
        return value[0]
    return value  # type: ignore[return-value]


def diffusers_from_fields(
    fields: Mapping[str, Any],
    widths: unet.Widths,
    linear_projections: bool,
    image_size: int,
) -> dict[str, Any]:
    """A config.json for UNet2DModel or UNet2DConditionModel; ValueError where neither fits.

    widths: of its inputs. image_size: of the latents.
    """
    module = UNet(**fields)
    if module.num_codes:
        raise ValueError("diffusers has no U-Net that predicts codes (num_codes)")
    outputs = [mult * module.model_channels for mult in module.channel_mult]
    attends = [unet.attends(module, level) for level in range(len(outputs))]
    conditional = module.transformer_depth > 0
    kind = ("CrossAttn" if conditional else "Attn", "")
    plain = "Resnet{}sample" if module.resblock_updown else "{}"
    if conditional and module.resblock_updown:
        raise ValueError("diffusers has no U-Net with resblock_updown and cross-attention")

    def blocks(side: str, each: list[bool]) -> list[str]:
        return [(f"{kind[0]}{side}" if yes else plain.format(side)) + "Block2D" for yes in each]

    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if conditional else "UNet2DModel",
        "act_fn": "silu",
        "attention_head_dim": _diffusers_heads(module, outputs, attends),
        "block_out_channels": outputs,
        "center_input_sample": False,
        "down_block_types": blocks("Down", attends),
        "up_block_types": blocks("Up", attends[::-1]),
        "downsample_padding": 1,
        "dropout": module.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": widths[0],
        "layers_per_block": module.num_res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": module.num_groups,
        "out_channels": module.out_channels,
        "resnet_time_scale_shift": "scale_shift" if module.use_scale_shift_norm else "default",
        "sample_size": image_size,
    }
    if not conditional:
        if module.vector_projection:
            raise ValueError("diffusers has no U-Net with vector_projection but no cross-attention")
        resample = "resnet" if module.resblock_updown else "conv"
        config |= {"downsample_type": resample, "upsample_type": resample}
        if module.use_scale_shift_norm:  # see `_check_middle_norm`
            config["attn_norm_num_groups"] = module.num_groups
        return config
    config["cross_attention_dim"] = widths[1]
    config["transformer_layers_per_block"] = module.transformer_depth
    config["use_linear_projection"] = linear_projections
    if any(module.disable_self_attentions):
        config["only_cross_attention"] = list(module.disable_self_attentions)
    if module.vector_projection:
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = widths[2]
    return config


def _diffusers_heads(module: UNet, widths: list[int], attends: list[bool]) -> int | list[int]:
    if module.transformer_depth:
        if not module.num_head_channels:
            return module.num_heads
        return [width // module.num_head_channels for width in widths]
    with_attention = {w for w, yes in zip(widths, attends, strict=True) if yes} | {widths[-1]}
    head_channels = {width // unet.num_heads(module, width) for width in with_attention}
    if len(head_channels) != 1:
        raise ValueError(
            f"diffusers' UNet2DModel has one width for all heads, this model has "
            f"{', '.join(map(str, sorted(head_channels)))}"
        )
    return head_channels.pop()
