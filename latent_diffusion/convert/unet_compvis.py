"""The U-Net's settings in the original's words: read off its tensors, from its yaml, and back."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert.settings import Fields, Settings, check_groups
from latent_diffusion.convert.tables import count
from latent_diffusion.convert.unet import Widths
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.unet import UNet

_SAME = (
    "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
    "use_scale_shift_norm", "resblock_updown", "dropout",
)  # fmt: skip
_SETTINGS = Settings(
    names={name: name for name in _SAME},
    defaults={"use_scale_shift_norm": False, "resblock_updown": False, "dropout": 0.0},
)


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Read the architecture off the original's tensors (names without prefix).

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
    channels = tensors["input_blocks.0.0.weight"].shape[0]
    firsts = [1 + level * (num_res_blocks + 1) for level in range(levels)]
    widths = [tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts]
    attends = [f"input_blocks.{i}.1.norm.weight" in tensors for i in firsts]
    depth = count(tensors, "middle_block.1.transformer_blocks.")
    embedding = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    fields = {
        "out_channels": tensors["out.2.weight"].shape[0],
        "model_channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": tuple(2**i for i, yes in enumerate(attends) if yes),
        "transformer_depth": depth,
        "use_scale_shift_norm": embedding == 2 * widths[0],
        "resblock_updown": any(_is_late_res_block(n) for n in tensors),
        "vector_projection": "label_emb.0.0.weight" in tensors,
    }
    context = context_dim(tensors)
    crossed = [  # the first attention takes the context, so that it is no self-attention
        bool(yes and depth and context != width)
        and tensors[f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight"].shape[1]
        == context
        for i, yes, width in zip(firsts, attends, widths, strict=True)
    ]
    if any(crossed):
        # The released ×4 upscaler says so of its first level, too, which has no attention.
        flags = [c or not yes for c, yes in zip(crossed, attends, strict=True)]
        fields["disable_self_attentions"] = tuple(flags)
    return fields


def _is_late_res_block(name: str) -> bool:
    """Whether a residual block is not the first module of an output block: it then upsamples."""
    parts = name.split(".")
    return parts[0] == "output_blocks" and parts[2] != "0" and parts[3] == "in_layers"


def context_dim(tensors: Mapping[str, Tensor]) -> int | None:
    """The width of the context in the original's cross-attention; None without cross-attention."""
    key = tensors.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    return None if key is None else key.shape[1]


def fields_from_yaml(params: Mapping[str, Any]) -> Fields:
    """Our fields from `unet_config.params` of the original's yaml."""
    fields = _SETTINGS.read(params, "UNetModel")
    fields["legacy_qkv_order"] = not params.get("use_new_attention_order", False)
    spatial = params.get("use_spatial_transformer", False)
    fields["transformer_depth"] = params.get("transformer_depth", 1) if spatial else 0
    for name in ("num_heads", "num_head_channels"):
        if params.get(name, -1) != -1:
            fields[name] = params[name]
    if any(params.get("disable_self_attentions") or ()):
        fields["disable_self_attentions"] = tuple(params["disable_self_attentions"])
    fields["vector_projection"] = params.get("num_classes") == "sequential"
    if params.get("n_embed"):
        fields["num_codes"] = params["n_embed"]
    return fields


def yaml_from_fields(
    fields: Mapping[str, Any], widths: Widths, linear_projections: bool, image_size: int
) -> dict[str, Any]:
    """The inverse of `fields_from_yaml`, with the original's class: ValueError where it has none.

    widths: of the U-Net's inputs. image_size: the side of the latents.
    """
    module = UNet(**fields)
    check_groups(module)
    params = _SETTINGS.write(module) | {"image_size": image_size, "in_channels": widths[0]}
    params |= {"use_checkpoint": module.remat != "none", "legacy": False}
    heads = "num_head_channels" if module.num_head_channels else "num_heads"
    params[heads] = getattr(module, heads)
    if module.transformer_depth:
        params |= {"use_spatial_transformer": True, "transformer_depth": module.transformer_depth}
        params["context_dim"] = widths[1]
        if linear_projections:
            params["use_linear_in_transformer"] = True
    else:
        params["use_new_attention_order"] = not module.legacy_qkv_order
    if any(module.disable_self_attentions):
        params["disable_self_attentions"] = list(module.disable_self_attentions)
    if module.vector_projection:
        params |= {"num_classes": "sequential", "adm_in_channels": widths[2]}
    if module.num_codes:
        params["n_embed"] = module.num_codes
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}
