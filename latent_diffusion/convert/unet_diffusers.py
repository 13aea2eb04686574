"""Read and write the U-Net's settings in diffusers' config.json."""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latent_diffusion.convert import unet
from latent_diffusion.convert.settings import Fields, Settings, single
from latent_diffusion.core.types import lookup
from latent_diffusion.nets.unet import UNet

_short = reprlib.repr

_BOTH = Settings(  # those of both classes
    names={"out_channels": "out_channels", "norm_num_groups": "num_groups", "dropout": "dropout"},
    defaults={
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "dropout": 0.0,
        "resnet_time_scale_shift": "default",
    },
    optional={"num_class_embeds": 1000},
    allowed={
        "act_fn": ("silu", "swish"),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1,),
        "norm_eps": (1e-5,),
    },
    checked={"time_embedding_type": ("positional",), "time_embedding_dim": (None,)},
    harmless=("sample_size",),  # `read_size` reads it
)
_NONE_ALONE = (
    "reverse_transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type",
    "num_attention_heads",
    "time_embedding_act_fn", "timestep_post_act", "cross_attention_norm",
)  # fmt: skip
_SETTINGS = {
    "UNet2DConditionModel": replace(
        _BOTH,
        defaults={
            **_BOTH.defaults,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "only_cross_attention": False,
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 8,
            "use_linear_projection": False,
        },
        optional={
            **_BOTH.optional,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2048,
            "time_cond_proj_dim": 256,
            "mid_block_only_cross_attention": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
        },
        per_level=(
            "layers_per_block", "only_cross_attention", "cross_attention_dim",
            "transformer_layers_per_block", "attention_head_dim",
        ),
        checked={
            **_BOTH.checked,
            "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "dual_cross_attention": (False,),
            "resnet_skip_time_act": (False,),
            "resnet_out_scale_factor": (1.0,),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "attention_type": ("default",),
            "class_embeddings_concat": (False,),
            **dict.fromkeys(_NONE_ALONE, (None,)),
        },
        # The last one belongs to an `addition_embed_type` that is refused.
        harmless=("sample_size", "upcast_attention", "addition_embed_type_num_heads"),
    ),
    "UNet2DModel": replace(
        _BOTH,
        defaults={
            **_BOTH.defaults,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
            "downsample_type": "conv",
            "upsample_type": "conv",
            "attention_head_dim": 8,
        },
        optional={**_BOTH.optional, "attention_head_dim": 8, "attn_norm_num_groups": 32},
        checked={
            **_BOTH.checked,
            "mid_block_type": ("UNetMidBlock2D",),
            "add_attention": (True,),
            "class_embed_type": (None,),
        },
        # The last one belongs to another `time_embedding_type`.
        harmless=("sample_size", "num_train_timesteps"),
    ),
}  # fmt: skip
_BLOCKS: dict[str, dict[str, tuple[bool, str]]] = {
    # kind of block → whether it attends, and how it changes the resolution ("": by a setting)
    "UNet2DConditionModel": {"CrossAttn{}Block2D": (True, "conv"), "{}Block2D": (False, "conv")},
    "UNet2DModel": {
        "Attn{}Block2D": (True, ""),
        "{}Block2D": (False, "conv"),
        "Resnet{}sampleBlock2D": (False, "resnet"),
    },
}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of UNet2DModel or UNet2DConditionModel, checked and with their defaults."""
    return _SETTINGS[config["_class_name"]].complete(config, config["_class_name"])


def input_widths(values: Mapping[str, Any]) -> unet.Widths:
    """The widths of the U-Net's inputs. values: the result of `complete`."""
    context = vector = None
    if "cross_attention_dim" in values:
        context = single(values, "cross_attention_dim", values["_class_name"])
        if _takes_vector(values):
            vector = values["projection_class_embeddings_input_dim"]
    return values["in_channels"], context, vector


def is_text_time(values: Mapping[str, Any]) -> bool:
    """Whether the vector is that of a text and of sizes. values: the result of `complete`."""
    return values.get("addition_embed_type") is not None


def _takes_vector(values: Mapping[str, Any]) -> bool:
    return values.get("class_embed_type") == "projection" or is_text_time(values)


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of UNet2DModel or UNet2DConditionModel.

    Raises ValueError for a setting that our U-Net can't express.
    """
    name = config["_class_name"]
    fields, config = _SETTINGS[name].read(config, name), complete(config)
    widths = list(config["block_out_channels"])
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"{name}.block_out_channels={widths}; expected multiples of the first one")
    attends, resampled = _levels(config, len(widths))
    fields |= {
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": single(config, "layers_per_block", name),
        "attention_resolutions": tuple(2**i for i, yes in enumerate(attends) if yes),
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": resampled,
        "vector_projection": _takes_vector(config),
    }
    _check_one_of(config, "resnet_time_scale_shift", ("default", "scale_shift"))
    heads: Any = config["attention_head_dim"]
    if name == "UNet2DModel":
        _check_middle_norm(config, fields["use_scale_shift_norm"])
        # The setting is the width of a head; without it there is one head.
        fields |= {"num_heads": 1} if heads is None else {"num_head_channels": heads}
        return {**fields, "transformer_depth": 0}
    _check_one_of(config, "class_embed_type", (None, "projection"))
    if config["time_cond_proj_dim"] is not None:
        fields["guidance_dim"] = config["time_cond_proj_dim"]
    _check_one_of(config, "addition_embed_type", (None, "text_time"))
    if is_text_time(config):
        _check_one_of(config, "class_embed_type", (None,))
        if config["addition_time_embed_dim"] is None:
            raise ValueError(
                f"{name}.addition_embed_type='text_time' needs addition_time_embed_dim"
            )
    depth = config["transformer_layers_per_block"]
    fields |= unet.depth_fields(depth, None, fields)
    if any(crossed := _crossed(config, len(widths))):
        fields["disable_self_attentions"] = crossed
    # The setting is the number of heads here, though its name says the width of a head.
    if isinstance(heads, int) or len(set(heads)) == 1:
        return {**fields, "num_heads": heads if isinstance(heads, int) else heads[0]}
    head_channels = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(head_channels) != 1:
        raise ValueError(f"{name}.attention_head_dim={heads}: heads of different widths")
    return {**fields, "num_head_channels": head_channels.pop()}


def _check_one_of(config: Mapping[str, Any], setting: str, supported: tuple[Any, ...]) -> None:
    if config[setting] not in supported:
        raise ValueError(
            f"{config['_class_name']}.{setting}={config[setting]!r}; "
            f"supported: {' or '.join(map(repr, supported))}"
        )


def _levels(config: Mapping[str, Any], levels: int) -> tuple[list[bool], bool]:
    """For each level whether it attends, and whether residual blocks change the resolution."""
    downs, ups = _blocks(config, "Down"), _blocks(config, "Up")[::-1]
    attends = [attend for attend, _ in downs]
    # The last block on either path doesn't change the resolution.
    changes = {change for _, change in downs[:-1] + ups[1:]}
    if len(downs) != levels or attends != [a for a, _ in ups] or len(changes) > 1:
        raise ValueError(
            f"{config['_class_name']}: down_block_types={_short(config['down_block_types'])} and "
            f"up_block_types={_short(config['up_block_types'])} for {levels} block_out_channels; "
            "supported: the same on both ways, all of which change the resolution alike"
        )
    return attends, changes == {"resnet"}


def _blocks(config: Mapping[str, Any], side: str) -> list[tuple[bool, str]]:
    """For each block on one path, whether it attends, and how it changes the resolution."""
    name, setting = config["_class_name"], f"{side.lower()}_block_types"
    kinds = {kind.format(side): block for kind, block in _BLOCKS[name].items()}
    blocks = [lookup(kinds, kind, f"{name}.{setting}") for kind in config[setting]]
    sampler = config.get(f"{side.lower()}sample_type")
    if sampler is not None:
        _check_one_of(config, f"{side.lower()}sample_type", ("conv", "resnet"))
    return [(attends, change or str(sampler)) for attends, change in blocks]


def _crossed(config: Mapping[str, Any], levels: int) -> tuple[bool, ...]:
    """For each level whether its first attention takes the context.

    Raises ValueError where the middle differs from the last level.
    """
    said, middle = config["only_cross_attention"], config["mid_block_only_cross_attention"]
    crossed = tuple(said) if isinstance(said, list | tuple) else (said,) * levels
    if middle is None:
        middle = said if isinstance(said, bool) else False
    if len(crossed) != levels or crossed[-1] != middle:
        raise ValueError(
            f"UNet2DConditionModel.only_cross_attention={_short(said)} and "
            f"mid_block_only_cross_attention={middle}; supported: {levels} levels, of which the "
            "last and the middle are alike"
        )
    return crossed


def _check_middle_norm(config: Mapping[str, Any], scale_shift: bool) -> None:
    """Raise ValueError for a middle attention whose norm is absent or has other groups."""
    groups = config["norm_num_groups"]
    middle = config["attn_norm_num_groups"] or (None if scale_shift else groups)
    if middle != groups:
        raise ValueError(
            f"UNet2DModel.attn_norm_num_groups={middle} with {groups} groups in other norms; "
            f"supported: {groups}"
        )


def diffusers_from_fields(
    fields: Mapping[str, Any],
    widths: unet.Widths,
    linear_projections: bool,
    image_size: Any,
    time_width: int | None = None,
) -> dict[str, Any]:
    """A config.json for UNet2DModel or UNet2DConditionModel; ValueError where neither fits.

    widths: those of the U-Net's inputs. image_size: the side of the latents. time_width: the width
    of each size's sinusoid in the vector; None where the vector has no sizes.
    """
    module = UNet(**fields)
    conditional = unet.is_conditional(module)
    for is_lacking, kind in (
        (module.num_codes, "that predicts codes (num_codes)"),
        (conditional and module.resblock_updown, "with resblock_updown and cross-attention"),
        (not conditional and module.vector_projection, "with vector_projection alone"),
        (not conditional and module.guidance_dim, "with guidance_dim and without a context"),
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
        **_BOTH.write(module),
        "_class_name": "UNet2DConditionModel" if conditional else "UNet2DModel",
        "attention_head_dim": _diffusers_heads(module, outputs, attends),
        "block_out_channels": outputs,
        "down_block_types": blocks("Down", attends),
        "up_block_types": blocks("Up", attends[::-1]),
        "in_channels": widths[0],
        "layers_per_block": module.num_res_blocks,
        "resnet_time_scale_shift": "scale_shift" if module.use_scale_shift_norm else "default",
        "sample_size": list(image_size) if isinstance(image_size, tuple) else image_size,
    }
    if not conditional:
        resample = "resnet" if module.resblock_updown else "conv"
        config |= {"downsample_type": resample, "upsample_type": resample}
        if module.use_scale_shift_norm:  # see `_check_middle_norm`
            config["attn_norm_num_groups"] = module.num_groups
        return config
    config["cross_attention_dim"] = widths[1]
    config["transformer_layers_per_block"] = _diffusers_depth(module)
    config["use_linear_projection"] = linear_projections
    if module.guidance_dim is not None:
        config["time_cond_proj_dim"] = module.guidance_dim
    if any(module.disable_self_attentions):
        config["only_cross_attention"] = list(module.disable_self_attentions)
        if module.disable_self_attentions[-1]:
            config["mid_block_only_cross_attention"] = True
    if module.vector_projection:
        if time_width is None:
            config["class_embed_type"] = "projection"
        else:
            config["addition_embed_type"] = "text_time"
            config["addition_time_embed_dim"] = time_width
        config["projection_class_embeddings_input_dim"] = widths[2]
    return config


def _diffusers_depth(module: UNet) -> int | list[int]:
    depth, last = module.transformer_depth, module.depths[-2]
    if module.depths[-1] == last:
        return depth if isinstance(depth, int) else list(depth)
    if unet.attends(module, len(module.channel_mult) - 1):
        raise ValueError(
            f"diffusers' middle has as many blocks as the last level ({last}), this model "
            f"{module.depths[-1]}; save it in the original's format"
        )
    return [*module.depths[:-2], module.depths[-1]]


def _diffusers_heads(module: UNet, widths: list[int], attends: list[bool]) -> int | list[int]:
    """The setting `attention_head_dim`: numbers of heads with cross-attention, else a width."""
    if unet.is_conditional(module):
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
