"""The U-Net's settings in diffusers' words: a config.json, read and written."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert import unet
from latent_diffusion.convert.settings import Fields, Settings
from latent_diffusion.nets.unet import UNet

_NONE_ALONE = (
    "time_embedding_dim", "encoder_hid_dim", "addition_embed_type", "time_cond_proj_dim",
    "cross_attention_norm", "mid_block_only_cross_attention",
    "reverse_transformer_layers_per_block",
)  # fmt: skip
_SETTINGS = Settings(
    names={
        "out_channels": "out_channels",
        "norm_num_groups": "num_groups",
        "dropout": "dropout",
    },
    defaults={"dropout": 0.0},
    allowed={
        "act_fn": ("silu", "swish"),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1,),
        "norm_eps": (1e-5,),
    },
    checked={
        "class_embed_type": (None, "projection"),
        "time_embedding_type": ("positional",),
        "add_attention": (True,),
        "dual_cross_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        **dict.fromkeys(_NONE_ALONE, (None,)),
    },
)


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of UNet2DModel or UNet2DConditionModel.

    Raises ValueError for a setting that our U-Net can't express.
    """
    name, widths = config["_class_name"], list(config["block_out_channels"])
    fields = _SETTINGS.read(config, name)
    kinds = config["down_block_types"]
    attends = ["Attn" in kind for kind in kinds]
    resample = [k.startswith("Resnet") for k in kinds] + [config.get("downsample_type") == "resnet"]
    fields |= {
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": _single(config, "layers_per_block"),
        "attention_resolutions": tuple(2**i for i, yes in enumerate(attends) if yes),
        "use_scale_shift_norm": config.get("resnet_time_scale_shift") == "scale_shift",
        "resblock_updown": any(resample),
        "vector_projection": config.get("class_embed_type") == "projection",
    }
    heads: Any = config.get("attention_head_dim")
    if name == "UNet2DModel":
        _check_middle_norm(config, fields["use_scale_shift_norm"])
        # The setting is the width of a head; without it there is one head.
        fields |= {"num_heads": 1} if heads is None else {"num_head_channels": heads}
        return {**fields, "transformer_depth": 0}
    fields["transformer_depth"] = _single(config, "transformer_layers_per_block", 1)
    crossed = config.get("only_cross_attention") or False
    crossed = crossed if isinstance(crossed, list | tuple) else [crossed] * len(widths)
    if any(crossed):
        fields["disable_self_attentions"] = tuple(crossed)
    # The setting is the number of heads here, though its name says the width of a head.
    if isinstance(heads, int) or len(set(heads)) == 1:
        return {**fields, "num_heads": heads if isinstance(heads, int) else heads[0]}
    head_channels = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(head_channels) != 1:
        raise ValueError(f"{name}.attention_head_dim={heads}: heads of different widths")
    return {**fields, "num_head_channels": head_channels.pop()}


def _check_middle_norm(config: Mapping[str, Any], scale_shift: bool) -> None:
    """The middle attention of our U-Net has a norm like the others; diffusers can leave it out."""
    groups = config["norm_num_groups"]
    middle = config.get("attn_norm_num_groups") or (None if scale_shift else groups)
    if middle != groups:
        raise ValueError(
            f"UNet2DModel.attn_norm_num_groups={middle} with {groups} groups in other norms; "
            f"supported: {groups}"
        )


def _single(config: Mapping[str, Any], key: str, default: int | None = None) -> Any:
    """The value of a setting that may be a list with one value per level."""
    value = config.get(key, default)
    values = value if isinstance(value, list | tuple) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"{config['_class_name']}.{key}={value}; supported: one for all levels")
    return values[0]


def diffusers_from_fields(
    fields: Mapping[str, Any], widths: unet.Widths, linear_projections: bool, image_size: int
) -> dict[str, Any]:
    """A config.json for UNet2DModel or UNet2DConditionModel; ValueError where neither fits.

    widths: of the U-Net's inputs. image_size: the side of the latents.
    """
    module = UNet(**fields)
    conditional = module.transformer_depth > 0
    for is_lacking, kind in (
        (module.num_codes, "that predicts codes (num_codes)"),
        (conditional and module.resblock_updown, "with resblock_updown and cross-attention"),
        (not conditional and module.vector_projection, "with vector_projection alone"),
    ):
        if is_lacking:
            raise ValueError(f"diffusers has no U-Net {kind}; save it as orbax")
    outputs = [mult * module.model_channels for mult in module.channel_mult]
    attends = [unet.attends(module, level) for level in range(len(outputs))]
    kind = "CrossAttn" if conditional else "Attn"
    plain = "Resnet{}sample" if module.resblock_updown else "{}"

    def blocks(side: str, each: list[bool]) -> list[str]:
        return [(f"{kind}{side}" if yes else plain.format(side)) + "Block2D" for yes in each]

    config = {
        **_SETTINGS.write(module),
        "_class_name": "UNet2DConditionModel" if conditional else "UNet2DModel",
        "attention_head_dim": _diffusers_heads(module, outputs, attends),
        "block_out_channels": outputs,
        "down_block_types": blocks("Down", attends),
        "up_block_types": blocks("Up", attends[::-1]),
        "in_channels": widths[0],
        "layers_per_block": module.num_res_blocks,
        "resnet_time_scale_shift": "scale_shift" if module.use_scale_shift_norm else "default",
        "sample_size": image_size,
    }
    if not conditional:
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
    """The setting `attention_head_dim`: numbers of heads with cross-attention, else their width."""
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
