"""The U-Net's names, shapes and settings in the original's files and in diffusers'."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from latent_diffusion.convert.tables import Kind, Rule, Table, inside, joint_qkv
from latent_diffusion.models.unet import UNet
from latent_diffusion.tensor import Tensor
from latent_diffusion.types import Conditioning

Fields = dict[str, Any]
Widths = tuple[int, int | None, int | None]  # channels, of the context, of the vector

_RES = (  # ours, the original's, diffusers', kind
    ("in_layers_0", "in_layers.0", "norm1", "norm"),
    ("in_layers_2", "in_layers.2", "conv1", "conv"),
    ("emb_layers_1", "emb_layers.1", "time_emb_proj", "linear"),
    ("out_layers_0", "out_layers.0", "norm2", "norm"),
    ("out_layers_3", "out_layers.3", "conv2", "conv"),
    ("skip_connection", "skip_connection", "conv_shortcut", "conv"),
)
_COMPVIS_RES = tuple(Rule(ours, theirs, kind) for ours, theirs, _, kind in _RES)
_DIFFUSERS_RES = tuple(Rule(ours, theirs, kind) for ours, _, theirs, kind in _RES)

_BLOCK, _SUB = r"transformer_blocks_(?P<depth>\d+)", r"transformer_blocks.\g<depth>"


def _spatial_transformer(linear: bool) -> Table:
    """The same names in both; linear: SD 2 keeps the outer projections as linear maps."""
    projection = "linear" if linear else "linear_2d"
    return (
        Rule("norm", "norm", "norm"),
        Rule("(?P<proj>proj_in|proj_out)", r"\g<proj>", projection),
        Rule(rf"{_BLOCK}/(?P<norm>norm\d)", rf"{_SUB}.\g<norm>", "norm"),
        Rule(rf"{_BLOCK}/(?P<attn>attn\d)/to_out", rf"{_SUB}.\g<attn>.to_out.0", "linear"),
        Rule(rf"{_BLOCK}/(?P<attn>attn\d)/(?P<to>to_.)", rf"{_SUB}.\g<attn>.\g<to>", "linear"),
        Rule(rf"{_BLOCK}/ff/proj_in", rf"{_SUB}.ff.net.0.proj", "linear"),
        Rule(rf"{_BLOCK}/ff/proj_out", rf"{_SUB}.ff.net.2", "linear"),
    )


_COMPVIS_ATTENTION = (
    Rule("norm", "norm", "norm"),
    Rule("(?P<map>qkv|proj_out)", r"\g<map>", "linear_1d"),
)


def _diffusers_attention(module: UNet, channels: int) -> Table:
    qkv: Kind = joint_qkv(
        ("to_q", "to_k", "to_v"), _num_heads(module, channels), module.legacy_qkv_order
    )
    return (
        Rule("norm", "group_norm", "norm"),
        Rule("proj_out", "to_out.0", "linear"),
        Rule("qkv", "", qkv),
    )


def _num_heads(module: UNet, channels: int) -> int:
    if module.num_head_channels:
        return channels // module.num_head_channels
    return module.num_heads


def compvis_table(fields: Mapping[str, Any], linear_projections: bool) -> Table:
    """Our paths are the original's names with other punctuation."""
    blocks = [
        (r"(input|output)_blocks_(\d+)_(\d)", r"\1_blocks.\2.\3"),
        (r"middle_block_(\d)", r"middle_block.\1"),
    ]
    attention = _spatial_transformer(linear_projections)
    if not UNet(**fields).transformer_depth:
        attention = _COMPVIS_ATTENTION
    return [
        Rule(r"time_embed_(\d)", r"time_embed.\1", "linear"),
        Rule(r"label_emb_(\d)", r"label_emb.0.\1", "linear"),
        Rule("input_blocks_0_0", "input_blocks.0.0", "conv"),
        Rule(r"input_blocks_(\d+)_0_op", r"input_blocks.\1.0.op", "conv"),
        Rule(r"output_blocks_(\d+)_(\d)_conv", r"output_blocks.\1.\2.conv", "conv"),
        Rule("out_0", "out.0", "norm"),
        Rule("out_2", "out.2", "conv"),
        Rule("id_predictor_0", "id_predictor.0", "norm"),
        Rule("id_predictor_1", "id_predictor.1", "conv"),
        *inside(blocks, _COMPVIS_RES),
        *inside(blocks, attention),
    ]


def _walk(module: UNet) -> Iterator[tuple[str, str, str, int]]:
    """Our blocks and diffusers', what they are ("res", "attention", "conv"), and their width."""
    levels, n = len(module.channel_mult), module.num_res_blocks
    resample = "res" if module.resblock_updown else "conv"
    op, conv = ("", "") if module.resblock_updown else ("_op", "_conv")
    dot = "" if module.resblock_updown else ".conv"
    index = 0
    for level, mult in enumerate(module.channel_mult):
        width, theirs = mult * module.model_channels, f"down_blocks.{level}"
        for i in range(n):
            index += 1
            yield f"input_blocks_{index}_0", f"{theirs}.resnets.{i}", "res", width
            if _attends(module, level):
                yield f"input_blocks_{index}_1", f"{theirs}.attentions.{i}", "attention", width
        if level != levels - 1:
            index += 1
            yield f"input_blocks_{index}_0{op}", f"{theirs}.downsamplers.0{dot}", resample, width
    yield "middle_block_0", "mid_block.resnets.0", "res", width
    yield "middle_block_1", "mid_block.attentions.0", "attention", width
    yield "middle_block_2", "mid_block.resnets.1", "res", width
    for level in reversed(range(levels)):
        width = module.channel_mult[level] * module.model_channels
        theirs = f"up_blocks.{levels - 1 - level}"
        for i in range(n + 1):
            ours = f"output_blocks_{(levels - 1 - level) * (n + 1) + i}"
            yield f"{ours}_0", f"{theirs}.resnets.{i}", "res", width
            if _attends(module, level):
                yield f"{ours}_1", f"{theirs}.attentions.{i}", "attention", width
        if level:
            part = 2 if _attends(module, level) else 1
            yield f"{ours}_{part}{conv}", f"{theirs}.upsamplers.0{dot}", resample, width


def _attends(module: UNet, level: int) -> bool:
    return 2**level in module.attention_resolutions


def diffusers_table(fields: Mapping[str, Any], linear_projections: bool) -> Table:
    """diffusers groups blocks by level and by what they are."""
    module = UNet(**fields)
    table = [
        Rule("time_embed_0", "time_embedding.linear_1", "linear"),
        Rule("time_embed_2", "time_embedding.linear_2", "linear"),
        Rule("label_emb_0", "class_embedding.linear_1", "linear"),
        Rule("label_emb_2", "class_embedding.linear_2", "linear"),
        Rule("input_blocks_0_0", "conv_in", "conv"),
        Rule("out_0", "conv_norm_out", "norm"),
        Rule("out_2", "conv_out", "conv"),
    ]
    for ours, theirs, what, width in _walk(module):
        if what == "conv":
            table.append(Rule(ours, theirs, "conv"))
        elif what == "res":
            table += inside([(ours, theirs)], _DIFFUSERS_RES)
        elif module.transformer_depth:
            table += inside([(ours, theirs)], _spatial_transformer(linear_projections))
        else:
            table += inside([(ours, theirs)], _diffusers_attention(module, width))
    return [rule._replace(theirs=rule.theirs.rstrip(".")) for rule in table]


def shapes(
    fields: Mapping[str, Any], in_channels: int, context_dim: int | None, vector_dim: int | None
) -> Any:
    """The tree of parameter shapes of a U-Net with these fields and inputs."""
    module = UNet(**fields)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32")

    def init(z_t: Any, t: Any, context: Any, vector: Any) -> Any:
        conditioning = Conditioning(context=context, vector=vector)
        return module.init(jax.random.key(0), z_t, t, conditioning)

    side = 2 ** (len(module.channel_mult) - 1)
    context = array(1, 1, context_dim) if context_dim else None
    vector = array(1, vector_dim) if vector_dim else None
    return jax.eval_shape(init, array(1, side, side, in_channels), array(1), context, vector)[
        "params"
    ]


# ------------------------------------------------------------------------------- the original's


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> Fields:
    """Read the architecture off the original's tensors (names without prefix).

    The number of heads leaves no trace in the shapes; see `compvis.RELEASED`.
    """
    blocks = len({n.split(".")[1] for n in tensors if n.startswith("output_blocks.")})
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
    depth = len({n.split(".")[3] for n in tensors if n.startswith("middle_block.1.transformer_")})
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
    crossed = [  # a first attention to the context is not self-attention
        tensors[f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight"].shape[1] == context
        and context != width
        if yes and depth
        else False
        for i, yes, width in zip(firsts, attends, widths, strict=True)
    ]
    if any(crossed):
        # Levels without attention: what the released x4 upscaler says of its first.
        flags = [c or not yes for c, yes in zip(crossed, attends, strict=True)]
        fields["disable_self_attentions"] = tuple(flags)
    return fields


def _is_late_res_block(name: str) -> bool:
    """A residual block after the first place of an output block: it upsamples."""
    parts = name.split(".")
    return parts[0] == "output_blocks" and parts[2] != "0" and parts[3] == "in_layers"


def context_dim(tensors: Mapping[str, Tensor]) -> int | None:
    """Width of the context that the original's cross-attention takes, if it has any."""
    key = tensors.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    return None if key is None else key.shape[1]


_SAME_IN_YAML = (
    "out_channels", "model_channels", "num_res_blocks", "use_scale_shift_norm", "resblock_updown",
    "dropout",
)  # fmt: skip


def fields_from_yaml(params: Mapping[str, Any]) -> Fields:
    """Our fields from `unet_config.params` of the original's yaml."""
    fields = {name: params[name] for name in _SAME_IN_YAML if name in params}
    fields["channel_mult"] = tuple(params["channel_mult"])
    fields["attention_resolutions"] = tuple(params["attention_resolutions"])
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
    fields: Mapping[str, Any],
    widths: Widths,
    linear_projections: bool,
    image_size: int,
) -> dict[str, Any]:
    """The inverse of `fields_from_yaml`, with the original's class: ValueError where it has none.

    widths: of its inputs. image_size: of the latents.
    """
    module = UNet(**fields)
    if module.num_groups != 32:
        raise ValueError(
            f"the original's code has 32 groups in every norm, this model {module.num_groups}; "
            "save it as diffusers"
        )
    params = {name: getattr(module, name) for name in _SAME_IN_YAML}
    params.update(
        image_size=image_size,
        in_channels=widths[0],
        channel_mult=list(module.channel_mult),
        attention_resolutions=list(module.attention_resolutions),
        use_checkpoint=module.remat != "none",
        legacy=False,
    )
    if module.num_head_channels:
        params["num_head_channels"] = module.num_head_channels
    else:
        params["num_heads"] = module.num_heads
    if module.transformer_depth:
        params["use_spatial_transformer"] = True
        params["transformer_depth"] = module.transformer_depth
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


# ------------------------------------------------------------------------------------ diffusers'

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
    widths: Widths,
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
    attends = [_attends(module, level) for level in range(len(outputs))]
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
    head_channels = {width // _num_heads(module, width) for width in with_attention}
    if len(head_channels) != 1:
        raise ValueError(
            f"diffusers' UNet2DModel has one width for all heads, this model has "
            f"{', '.join(map(str, sorted(head_channels)))}"
        )
    return head_channels.pop()
