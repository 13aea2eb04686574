"""The U-Net's tensor names and shapes in files of the original and of diffusers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import Rule, Table, inside, joint_qkv
from latent_diffusion.core.types import Conditioning, Params
from latent_diffusion.nets.unet import UNet

Widths = tuple[int, int | None, int | None]  # input channels, width of context, width of vector

_RES = (  # our name, the original's, diffusers', kind
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
    """The names, the same in both libraries. linear: the outer projections are linear (SD 2)."""
    return (
        Rule("norm", "norm", "norm"),
        Rule("(?P<proj>proj_in|proj_out)", r"\g<proj>", "linear" if linear else "linear_2d"),
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
    names, heads = ("to_q", "to_k", "to_v"), num_heads(module, channels)
    return (
        Rule("norm", "group_norm", "norm"),
        Rule("proj_out", "to_out.0", "linear"),
        Rule("qkv", "", joint_qkv(names, heads, module.legacy_qkv_order)),
    )


def num_heads(module: UNet, channels: int) -> int:
    """The number of heads in a block with this number of channels."""
    if module.num_head_channels:
        return channels // module.num_head_channels
    return module.num_heads


def is_conditional(module: UNet) -> bool:
    """Whether attention is in transformers, which take a context."""
    return any(module.depths)


def attends(module: UNet, level: int) -> bool:
    """Whether the blocks of a level have attention."""
    return 2**level in module.attention_resolutions


def depth_fields(
    depth: int | Sequence[int], middle: int | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields for the numbers of blocks in transformers; one number where all are equal.

    depth: the number for all transformers, or for each level. middle: the number for the middle;
    None takes that of the last level. fields: the U-Net's other fields. A level without attention
    has no transformer, so its number has no effect; it becomes 1, as in the released files.
    """
    attention, levels = fields["attention_resolutions"], len(fields["channel_mult"])
    each = (depth,) * levels if isinstance(depth, int) else tuple(depth)
    if len(each) != levels:
        raise ValueError(f"transformers have {list(each)} blocks; expected {levels} numbers")
    middle = each[-1] if middle is None else middle
    each = tuple(d if 2**level in attention else 1 for level, d in enumerate(each))
    if {d for level, d in enumerate(each) if 2**level in attention} <= {middle}:
        return {"transformer_depth": middle}
    middle_depth = {} if each[-1] == middle else {"middle_depth": middle}
    return {"transformer_depth": each, **middle_depth}


def compvis_table(fields: Mapping[str, Any], linear_projections: bool) -> Table:
    """The original's names: our paths with other punctuation."""
    blocks = [
        (r"(input|output)_blocks_(\d+)_(\d)", r"\1_blocks.\2.\3"),
        (r"middle_block_(\d)", r"middle_block.\1"),
    ]
    attention = _spatial_transformer(linear_projections)
    if not is_conditional(UNet(**fields)):
        attention = _COMPVIS_ATTENTION
    return [
        Rule(r"time_embed_(\d)", r"time_embed.\1", "linear"),
        Rule(r"label_emb_(\d)", r"label_emb.0.\1", "linear"),
        Rule("input_blocks_0_0", "input_blocks.0.0", "conv"),
        Rule(r"input_blocks_(\d+)_0_op", r"input_blocks.\1.0.op", "conv"),
        Rule(r"output_blocks_(\d+)_(\d)_conv", r"output_blocks.\1.\2.conv", "conv"),
        Rule("(out|id_predictor)_0", r"\1.0", "norm"),
        Rule("out_2", "out.2", "conv"),
        Rule("id_predictor_1", "id_predictor.1", "conv"),
        *inside(blocks, _COMPVIS_RES),
        *inside(blocks, attention),
    ]


class Block(NamedTuple):
    """A block: our name and diffusers', its kind ("res", "attention" or "conv") and width.

    level: that of its resolution; for the middle it is the number of levels, as in `UNet.depths`.
    """

    ours: str
    theirs: str
    kind: str
    width: int
    level: int


def walk(module: UNet) -> Iterator[Block]:
    """The blocks of a U-Net in the order down, middle, up."""
    levels, n = len(module.channel_mult), module.num_res_blocks
    resample, op, conv, dot = "conv", "_op", "_conv", ".conv"
    if module.resblock_updown:
        resample, op, conv, dot = "res", "", "", ""
    index = 0
    for level, mult in enumerate(module.channel_mult):
        width, theirs = mult * module.model_channels, f"down_blocks.{level}"
        for i in range(n):
            index += 1
            ours = f"input_blocks_{index}"
            yield Block(f"{ours}_0", f"{theirs}.resnets.{i}", "res", width, level)
            if attends(module, level):
                yield Block(f"{ours}_1", f"{theirs}.attentions.{i}", "attention", width, level)
        if level != levels - 1:
            index += 1
            ours, theirs = f"input_blocks_{index}_0{op}", f"{theirs}.downsamplers.0{dot}"
            yield Block(ours, theirs, resample, width, level)
    yield Block("middle_block_0", "mid_block.resnets.0", "res", width, levels)
    yield Block("middle_block_1", "mid_block.attentions.0", "attention", width, levels)
    yield Block("middle_block_2", "mid_block.resnets.1", "res", width, levels)
    for level in reversed(range(levels)):
        width = module.channel_mult[level] * module.model_channels
        theirs = f"up_blocks.{levels - 1 - level}"
        for i in range(n + 1):
            ours = f"output_blocks_{(levels - 1 - level) * (n + 1) + i}"
            yield Block(f"{ours}_0", f"{theirs}.resnets.{i}", "res", width, level)
            if attends(module, level):
                yield Block(f"{ours}_1", f"{theirs}.attentions.{i}", "attention", width, level)
        if level:
            part = 2 if attends(module, level) else 1
            ours, theirs = f"{ours}_{part}{conv}", f"{theirs}.upsamplers.0{dot}"
            yield Block(ours, theirs, resample, width, level)


def diffusers_table(
    fields: Mapping[str, Any], linear_projections: bool, text_time: bool = False
) -> Table:
    """diffusers' names, which group blocks by level and kind.

    text_time: the vector is of a text and sizes (Stable Diffusion XL); its layers have other names.
    """
    module, vector = UNet(**fields), "add_embedding" if text_time else "class_embedding"
    table = [
        Rule("time_embed_0", "time_embedding.linear_1", "linear"),
        Rule("time_embed_2", "time_embedding.linear_2", "linear"),
        Rule("time_embed_guidance", "time_embedding.cond_proj", "linear"),
        Rule("label_emb_0", f"{vector}.linear_1", "linear"),
        Rule("label_emb_2", f"{vector}.linear_2", "linear"),
        Rule("input_blocks_0_0", "conv_in", "conv"),
        Rule("out_0", "conv_norm_out", "norm"),
        Rule("out_2", "conv_out", "conv"),
    ]
    for ours, theirs, kind, width, _ in walk(module):
        if kind == "conv":
            table.append(Rule(ours, theirs, "conv"))
        elif kind == "res":
            table += inside([(ours, theirs)], _DIFFUSERS_RES)
        elif is_conditional(module):
            table += inside([(ours, theirs)], _spatial_transformer(linear_projections))
        else:
            table += inside([(ours, theirs)], _diffusers_attention(module, width))
    return [rule._replace(theirs=rule.theirs.rstrip(".")) for rule in table]


def shapes(
    fields: Mapping[str, Any], in_channels: int, context_dim: int | None, vector_dim: int | None
) -> Params:
    """The tree of parameter shapes of a U-Net with these fields and widths of its inputs."""
    module = UNet(**fields)
    return parameter_shapes(module, *input_shapes(module, in_channels, context_dim, vector_dim))


def input_shapes(
    module: UNet, in_channels: int, context_dim: int | None, vector_dim: int | None
) -> tuple[Any, Any, Conditioning]:
    """The shapes of z_t, t and conditioning for the smallest latent of a U-Net or control net."""
    side = 2 ** (len(module.channel_mult) - 1)
    conditioning = Conditioning(context=array(1, 1, context_dim), vector=array(1, vector_dim))
    return array(1, side, side, in_channels), array(1), conditioning
