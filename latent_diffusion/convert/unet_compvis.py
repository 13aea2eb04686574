"""The U-Net's settings in the original: inferred from tensors, read from yaml, written to yaml."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert.settings import Fields, Settings, check_groups, single
from latent_diffusion.convert.tables import count
from latent_diffusion.convert.unet import Widths, depth_fields
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.unet import UNet

_SAME = (
    "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
    "use_scale_shift_norm", "resblock_updown", "dropout",
)  # fmt: skip
_SETTINGS = Settings(
    names={name: name for name in _SAME},
    required={
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": 2,
        "attention_resolutions": (4, 2, 1),
    },
    defaults={
        "channel_mult": (1, 2, 4, 8),
        "dropout": 0.0,
        "num_heads": -1,
        "num_head_channels": -1,
        "num_heads_upsample": -1,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "use_new_attention_order": False,
        "transformer_depth": 1,
        "use_linear_in_transformer": False,
    },
    optional={
        "context_dim": 768,
        "n_embed": 8192,
        "adm_in_channels": 1024,
        "disable_self_attentions": (True,),
        "num_attention_blocks": (2,),
        "transformer_depth_middle": 10,
        "use_spatial_transformer": True,  # Stable Diffusion XL's code has no such setting
    },
    per_level=("num_res_blocks", "context_dim", "transformer_depth"),
    checked={
        "conv_resample": (True,),
        "dims": (2,),
        "disable_middle_self_attn": (False,),
        "disable_middle_transformer": (False,),
        "spatial_transformer_attn_type": ("softmax", "softmax-xformers"),  # equal results
    },
    # `legacy` computes the same heads in another way; use_fp16 has no effect in the original.
    harmless=("image_size", "use_checkpoint", "use_fp16", "use_bf16", "legacy", "num_classes"),
)


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture from the original's tensors (names without prefix).

    Shapes don't show the number of heads; see `compvis.RELEASED`.
    """
    blocks = count(tensors, "output_blocks.")
    resamplers = {
        tuple(n.split(".")[1:3])
        for n in tensors
        if n.startswith("output_blocks.") and (".conv." in n or _is_late_res_block(n))
    }
    levels = 1 + len(resamplers)
    num_res_blocks = blocks // levels - 1
    if not blocks:  # a control net has only the downward path
        levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
        num_res_blocks = count(tensors, "input_blocks.") // levels - 1
    channels = tensors["input_blocks.0.0.weight"].shape[0]
    firsts = [1 + level * (num_res_blocks + 1) for level in range(levels)]
    widths = [tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts]
    attends = [f"input_blocks.{i}.1.norm.weight" in tensors for i in firsts]
    depths = [count(tensors, f"input_blocks.{i}.1.transformer_blocks.") for i in firsts]
    middle = count(tensors, "middle_block.1.transformer_blocks.")
    embedding = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    out_channels = tensors["input_blocks.0.0.weight"].shape[1]  # if the U-Net predicts codes
    if "out.2.weight" in tensors:
        out_channels = tensors["out.2.weight"].shape[0]
    fields = {
        "out_channels": out_channels,
        "model_channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": tuple(2**i for i, yes in enumerate(attends) if yes),
        "use_scale_shift_norm": embedding == 2 * widths[0],
        "resblock_updown": any(_is_late_res_block(n) for n in tensors),
        "vector_projection": "label_emb.0.0.weight" in tensors,
    }
    fields |= depth_fields(depths, middle, fields)
    if "id_predictor.1.weight" in tensors:
        fields["num_codes"] = tensors["id_predictor.1.weight"].shape[0]
    context = context_dim(tensors)
    crossed = [  # levels whose first attention takes the context: it is no self-attention
        bool(yes and middle and context != width)
        and tensors[f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight"].shape[1]
        == context
        for i, yes, width in zip(firsts, attends, widths, strict=True)
    ]
    if any(crossed):
        # The released ×4 upscaler sets it for its first level, too, which has no attention.
        flags = [c or not yes for c, yes in zip(crossed, attends, strict=True)]
        fields["disable_self_attentions"] = tuple(flags)
    return fields


def _is_late_res_block(name: str) -> bool:
    """Whether a tensor is of a residual block that upsamples: not the first of its output block."""
    parts = name.split(".")
    return parts[0] == "output_blocks" and parts[2] != "0" and parts[3] == "in_layers"


def context_dim(tensors: Mapping[str, Tensor]) -> int | None:
    """The width of the context in the original's cross-attention; None without cross-attention."""
    key = tensors.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    return None if key is None else key.shape[1]


def fields_from_yaml(params: Mapping[str, Any], linear: bool) -> Fields:
    """Our fields from `unet_config.params` of the original's yaml.

    linear: whether the tensors have linear maps around the transformers. Raises ValueError for a
    setting that our U-Net can't express.
    """
    values = _SETTINGS.complete(params, "UNetModel")
    fields = _SETTINGS.read(params, "UNetModel")
    fields["num_res_blocks"] = single(values, "num_res_blocks", "UNetModel")
    fields["legacy_qkv_order"] = not values["use_new_attention_order"]
    transformers = values["use_spatial_transformer"]
    transformers = bool(values["context_dim"]) if transformers is None else transformers
    depth = values["transformer_depth"] if transformers else 0
    middle = values["transformer_depth_middle"] if transformers else None
    fields |= depth_fields(depth, middle, fields)
    heads = {name: values[name] for name in ("num_heads", "num_head_channels")}
    fields |= {name: number for name, number in heads.items() if number != -1}
    if not fields.keys() & heads.keys():
        raise ValueError("UNetModel says neither num_heads nor num_head_channels")
    # The heads on the upward path; the setting has no effect with num_head_channels.
    if (
        values["num_heads_upsample"] not in (-1, values["num_heads"])
        and heads["num_head_channels"] == -1
    ):
        raise ValueError(
            f"UNetModel.num_heads_upsample={values['num_heads_upsample']}; supported: num_heads = "
            f"{values['num_heads']}"
        )
    if transformers and values["use_linear_in_transformer"] != linear:
        raise ValueError(
            f"UNetModel.use_linear_in_transformer={values['use_linear_in_transformer']}, but the "
            f"tensors show {linear}"
        )
    levels = len(fields["channel_mult"])
    blocks = values["num_attention_blocks"]
    if blocks is not None and list(blocks) != [fields["num_res_blocks"]] * levels:
        raise ValueError(
            f"UNetModel.num_attention_blocks={list(blocks)}; supported: num_res_blocks"
        )
    if any(crossed := tuple(values["disable_self_attentions"] or ())):
        fields["disable_self_attentions"] = crossed
        # The original's middle has self-attention; our middle is like the last level.
        if len(crossed) != levels or crossed[-1]:
            raise ValueError(
                f"UNetModel.disable_self_attentions={list(crossed)}; supported: {levels} levels, "
                "of which the last is False"
            )
    kind = values.get("num_classes")
    if not (kind is None or kind == "sequential" or type(kind) is int):
        raise ValueError(f"UNetModel.num_classes={kind!r}; supported: 'sequential' or a number")
    fields["vector_projection"] = kind == "sequential"
    if values["n_embed"]:
        fields["num_codes"] = values["n_embed"]
    return fields


def widths(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Widths:
    """The widths of the U-Net's inputs in its tensors; ValueError where the yaml differs."""
    vector = tensors.get("label_emb.0.0.weight")
    in_channels, context = tensors["input_blocks.0.0.weight"].shape[1], context_dim(tensors)
    width = None if vector is None else vector.shape[1]
    shown = {"in_channels": in_channels, "context_dim": context, "adm_in_channels": width}
    for name, number in shown.items():
        said = params.get(name)
        if said is not None and said not in (number, [number]):
            raise ValueError(f"UNetModel.{name}={said}, but the tensors have {number}")
    return in_channels, context, width


def yaml_from_fields(
    fields: Mapping[str, Any], widths: Widths, linear_projections: bool, image_size: int
) -> dict[str, Any]:
    """The inverse of `fields_from_yaml`, with the class; ValueError where the original has none.

    widths: those of the U-Net's inputs. image_size: the side of the latents.
    """
    module = UNet(**fields)
    check_groups(module)
    if module.guidance_dim is not None:
        raise ValueError("the original has no U-Net with guidance_dim; save it as diffusers")
    params = _SETTINGS.write(module) | {"image_size": image_size, "in_channels": widths[0]}
    params |= {"use_checkpoint": module.remat != "none", "legacy": False}
    heads = "num_head_channels" if module.num_head_channels else "num_heads"
    params[heads] = getattr(module, heads)
    if any(module.depths):
        depth = module.transformer_depth
        depth = depth if isinstance(depth, int) else list(depth)
        params |= {"use_spatial_transformer": True, "transformer_depth": depth}
        params["context_dim"] = widths[1]
        if module.middle_depth is not None:
            params["transformer_depth_middle"] = module.middle_depth
        if linear_projections:
            params["use_linear_in_transformer"] = True
    else:
        params["use_new_attention_order"] = not module.legacy_qkv_order
    if any(module.disable_self_attentions):
        if module.disable_self_attentions[-1]:
            raise ValueError(
                "the original's middle block has self-attention, which this model's last level and "
                "middle lack; save it as diffusers"
            )
        params["disable_self_attentions"] = list(module.disable_self_attentions)
    if module.vector_projection:
        params |= {"num_classes": "sequential", "adm_in_channels": widths[2]}
    if module.num_codes:
        params["n_embed"] = module.num_codes
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}
