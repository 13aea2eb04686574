"""MMDiT's tensor names and shapes in files of Stable Diffusion 3 and in diffusers' folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.bundle import Bundle, Part, check_depth, input_widths, read_part
from latent_diffusion.convert.dit import patch_kind
from latent_diffusion.convert.settings import Fields, Settings
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import (
    LINEAR,
    SAME,
    Kind,
    Layout,
    Leaf,
    Rule,
    Table,
    count,
    inside,
    joint_qkv,
    write_tensors,
)
from latent_diffusion.core.types import Conditioning, Params
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.mmdit import MMDiT

NAME = "SD3Transformer2DModel"
_POSITIONS = "pos_embed"
_TABLE = "pos_embed.pos_embed"  # diffusers' name of the table of positions
_SETTINGS = Settings(
    names={
        "patch_size": "patch_size",
        "num_layers": "depth",
        "num_attention_heads": "num_heads",
        "dual_attention_layers": "dual_attention",
        "pos_embed_max_size": "max_positions",
        "sample_size": "base_size",
    },
    defaults={
        "patch_size": 2,
        "num_layers": 18,
        "num_attention_heads": 18,
        "dual_attention_layers": (),
        "pos_embed_max_size": 96,
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "caption_projection_dim": 1152,
    },
    optional={"out_channels": 16, "dual_attention_layers": (0,)},
    checked={"qk_norm": (None, "rms_norm")},
)


def _positions(theirs: str) -> Rule:
    return Rule("", "", (Leaf(_POSITIONS, (theirs,), SAME),))


def original_table(fields: Mapping[str, Any]) -> Table:
    """The names in Stable Diffusion 3's original code."""
    stream, theirs = r"(?P<stream>x|context)_block", r"\g<stream>_block"
    block = (
        Rule(f"{stream}_adaLN_modulation/1", f"{theirs}.adaLN_modulation.1", "linear"),
        Rule(rf"{stream}_(?P<to>attn2?)_ln_(?P<m>q|k)", rf"{theirs}.\g<to>.ln_\g<m>", "norm"),
        Rule(rf"{stream}_(?P<to>attn2?|mlp)_(?P<m>\w+)", rf"{theirs}.\g<to>.\g<m>", "linear"),
    )
    return [
        _positions(_POSITIONS),
        Rule("x_embedder_proj", "x_embedder.proj", patch_kind(MMDiT(**fields).patch_size)),
        Rule(r"(t|y)_embedder_mlp_(\d)", r"\1_embedder.mlp.\2", "linear"),
        Rule("context_embedder", "context_embedder", "linear"),
        *inside([(r"joint_blocks_(?P<i>\d+)", r"joint_blocks.\g<i>")], block),
        Rule("final_layer_adaLN_modulation/1", "final_layer.adaLN_modulation.1", "linear"),
        Rule("final_layer_linear", "final_layer.linear", "linear"),
    ]


def diffusers_table(fields: Mapping[str, Any]) -> Table:
    """The names of diffusers, where scale comes before shift in the last two modulations."""
    mmdit = MMDiT(**fields)
    block, last = (r"joint_blocks_(?P<i>\d+)", r"transformer_blocks.\g<i>"), mmdit.depth - 1
    rules = [
        Rule("x_block_adaLN_modulation/1", "norm1.linear", "linear"),
        Rule("context_block_adaLN_modulation/1", "norm1_context.linear", "linear"),
    ]
    for stream, attention, (q, k, v), norm, proj in (
        ("x_block_attn", "attn", ("to_q", "to_k", "to_v"), "norm", "to_out.0"),
        ("x_block_attn2", "attn2", ("to_q", "to_k", "to_v"), "norm", "to_out.0"),
        (
            *("context_block_attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
            *("norm_added", "to_add_out"),
        ),
    ):
        rules += [
            Rule(f"{stream}_qkv", attention, joint_qkv((q, k, v), mmdit.num_heads, False)),
            Rule(rf"{stream}_ln_(?P<m>q|k)", rf"{attention}.{norm}_\g<m>", "norm"),
            Rule(f"{stream}_proj", f"{attention}.{proj}", "linear"),
        ]
    for stream, feed in (("x_block", "ff"), ("context_block", "ff_context")):
        rules += [
            Rule(f"{stream}_mlp_fc1", f"{feed}.net.0.proj", "linear"),
            Rule(f"{stream}_mlp_fc2", f"{feed}.net.2", "linear"),
        ]
    embedders = {"t": "timestep_embedder", "y": "text_embedder"}
    return [
        _positions(_TABLE),
        Rule("x_embedder_proj", "pos_embed.proj", patch_kind(mmdit.patch_size)),
        *(
            Rule(f"{ours}_embedder_mlp_{index}", f"time_text_embed.{theirs}.linear_{n}", "linear")
            for ours, theirs in embedders.items()
            for index, n in ((0, 1), (2, 2))
        ),
        Rule("context_embedder", "context_embedder", "linear"),
        Rule(
            f"joint_blocks_{last}/context_block_adaLN_modulation/1",
            f"transformer_blocks.{last}.norm1_context.linear",
            _SWAPPED,
        ),
        *inside([block], rules),
        Rule("final_layer_adaLN_modulation/1", "norm_out.linear", _SWAPPED),
        Rule("final_layer_linear", "proj_out", "linear"),
    ]


def _swapped(layout: Layout) -> Layout:
    """The same layout where files have the two halves of the outputs in reverse order."""

    def swap(w: np.ndarray) -> np.ndarray:
        return np.roll(w, len(w) // 2, axis=0)

    return Layout(
        f"swapped, {layout.name}",
        lambda w: layout.read(swap(w)),
        lambda k: tuple(swap(w) for w in layout.write(k)),
    )


_SWAPPED: Kind = (
    Leaf("kernel", (".weight",), _swapped(LINEAR)),
    Leaf("bias", (".bias",), _swapped(SAME)),
)


def shapes(fields: Mapping[str, Any], channels: int, context: int, vector: int) -> Params:
    """The tree of parameter shapes of a transformer with these fields and widths of its inputs."""
    mmdit = MMDiT(**fields)
    z_t = array(1, mmdit.patch_size, mmdit.patch_size, channels)
    beside = Conditioning(context=array(1, 1, context), vector=array(1, vector))
    return parameter_shapes(mmdit, z_t, array(1), beside)


def fields_from_shapes(tensors: Mapping[str, Tensor]) -> tuple[Fields, tuple[int, int, int]]:
    """The fields of a transformer with the original's names, and the widths of its three inputs.

    A head has 64 channels, as in the released models.
    """
    width, channels, side, _ = tensors["x_embedder.proj.weight"].shape
    depth = count(tensors, "joint_blocks.")
    dual = (f"joint_blocks.{i}.x_block.attn2.qkv.weight" for i in range(depth))
    hidden = tensors["joint_blocks.0.x_block.mlp.fc1.weight"].shape[0]
    fields = {
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // side**2,
        "patch_size": side,
        "width": width,
        "depth": depth,
        "num_heads": width // 64,
        "mlp_ratio": hidden / width,
        "qk_norm": "joint_blocks.0.x_block.attn.ln_q.weight" in tensors,
        "dual_attention": tuple(i for i, name in enumerate(dual) if name in tensors),
        "max_positions": round(tensors[_POSITIONS].shape[1] ** 0.5),
        "base_size": 128,
    }
    context = tensors["context_embedder.weight"].shape[1]
    vector = tensors["y_embedder.mlp.0.weight"].shape[1]
    return fields, (channels, context, vector)


def read_original(where: Path, tensors: Mapping[str, Tensor]) -> Part:
    """Read the transformer of a single file, by the names of `original_table`."""
    fields, widths = fields_from_shapes(tensors)
    check_depth(where, fields, tensors)
    return read_part(where, fields, original_table(fields), shapes(fields, *widths), tensors)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of SD3Transformer2DModel, checked and with its defaults."""
    values = _SETTINGS.complete(config, NAME)
    values["out_channels"] = values["out_channels"] or values["in_channels"]
    return {**values, "dual_attention_layers": tuple(values["dual_attention_layers"] or ())}


def read_component(where: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bundle:
    """Read diffusers' transformer. Raises ValueError with the reason if it can't be read."""
    values = complete(config)
    width = values["num_attention_heads"] * values["attention_head_dim"]
    needed = {"caption_projection_dim": width, "out_channels": values["in_channels"]}
    for name, value in needed.items():
        if values[name] != value:
            raise ValueError(f"{NAME}.{name}={values[name]}; supported: {value}")
    fields = {
        **_SETTINGS.read(values, NAME),
        "out_channels": values["out_channels"],
        "width": width,
        "qk_norm": values["qk_norm"] is not None,
    }
    check_depth(where, fields, tensors)
    shape = tensors[_TABLE].shape if _TABLE in tensors else "absent"
    if shape[1:2] != ((side := values["pos_embed_max_size"]) ** 2,):  # before shapes are computed
        raise ValueError(f"{NAME}.pos_embed_max_size={side}, but {_TABLE} is {shape}")
    widths = (values[f"{name}_dim"] for name in ("joint_attention", "pooled_projection"))
    tree = shapes(fields, values["in_channels"], *widths)
    part = read_part(where, fields, diffusers_table(fields), tree, tensors)
    return Bundle(mmdit=part, notes={"mmdit": dict(config)})


def as_component(bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the tensors of diffusers' transformer."""
    assert bundle.mmdit is not None
    mmdit = MMDiT(**bundle.mmdit.fields)
    channels, context, vector = input_widths(bundle.mmdit)
    if mmdit.mlp_ratio != 4 or vector is None or channels != mmdit.out_channels:
        raise ValueError(
            f"diffusers' {NAME} has mlp_ratio=4, a vector and no further channels; save it as orbax"
        )
    config = {
        "_class_name": NAME,
        **_SETTINGS.write(mmdit),
        "in_channels": channels,
        "out_channels": mmdit.out_channels,
        "attention_head_dim": mmdit.width // mmdit.num_heads,
        "joint_attention_dim": context,
        "pooled_projection_dim": vector,
        "caption_projection_dim": mmdit.width,
        "qk_norm": "rms_norm" if mmdit.qk_norm else None,
    }
    return config, write_tensors(diffusers_table(bundle.mmdit.fields), bundle.mmdit.params)


def as_original(part: Part) -> dict[str, Tensor]:
    """The tensors of the transformer under the names in Stable Diffusion 3's original code."""
    mmdit = MMDiT(**part.fields)
    if mmdit.width != 64 * mmdit.num_heads:
        raise ValueError(
            f"this format's transformer has heads of 64 channels, this model {mmdit.num_heads} "
            f"heads in {mmdit.width} channels; save it as diffusers"
        )
    return write_tensors(original_table(part.fields), part.params)
