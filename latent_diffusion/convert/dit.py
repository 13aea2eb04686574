"""The DiT's tensor names and shapes in files of its authors (facebookresearch/DiT) and diffusers.

A file of the authors is a flat list of tensors without settings.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.bundle import Bundle, check_depth, read_part, same_noise
from latent_diffusion.convert.inputs import CLASS, conditioners_for
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.convert.settings import Settings
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
    joint_qkv,
    write_tensors,
)
from latent_diffusion.core.types import Params
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.dit import DiT, positions_2d

log = logging.getLogger(__name__)

PATCHES, LABELS, POSITIONS = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "pos_embed",
)
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # width → heads, in the sizes S, B, L and XL
# The released models' schedule and guided sampling (DiT's diffusion/ and sample.py).
DIFFUSION = {**ASSUMED, "schedule": "sqrt_linear", "beta_start": 1e-4, "beta_end": 0.02}
_SAMPLING = {"sampler": "ddpm", "num_steps": 250, "spacing": "uniform", "guidance_scale": 4.0}
_SAMPLING |= {"guidance_channels": 3}
# The same for SiT's models, which are flows: 250 steps of Euler's method.
_SIT = {**DIFFUSION, "schedule": "rectified_flow", "prediction": "flow"}
_SIT_SAMPLING = {**_SAMPLING, "sampler": "ddim", "spacing": "trailing"}
_SETTINGS = Settings(
    names={
        "patch_size": "patch_size",
        "num_layers": "depth",
        "num_attention_heads": "num_heads",
        "norm_eps": "mlp_norm_eps",
        "sample_size": "base_size",
    },
    defaults={
        "patch_size": 2,
        "num_layers": 28,
        "num_attention_heads": 16,
        "norm_eps": 1e-5,
        "sample_size": 32,
        "attention_head_dim": 72,
        "in_channels": 4,
        "num_embeds_ada_norm": 1000,
    },
    optional={"out_channels": 8},
    checked={  # settings of Transformer2DModel, the class in older folders
        "use_linear_projection": (False,),
        "only_cross_attention": (False,),
        "double_self_attention": (False,),
        "attention_type": ("default",),
    },
    harmless=("dropout", "norm_num_groups"),
    allowed={
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "norm_elementwise_affine": (False,),
        "norm_type": ("ada_norm_zero",),
        "upcast_attention": (False, None),
    },
)


@functools.cache  # as in `tables`
def _patches(side: int) -> Layout:
    """The layout of a linear map of patches that files store as a convolution without overlap."""

    def read(w: np.ndarray) -> np.ndarray:
        return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])

    def write(k: np.ndarray) -> tuple[np.ndarray, ...]:
        return (k.reshape(side, side, -1, k.shape[-1]).transpose(3, 2, 0, 1),)

    return Layout(f"patches of {side}", read, write)


def patch_kind(side: int) -> Kind:
    """The kind of a linear map of patches of side² pixels that files store as a convolution."""
    return Leaf("kernel", (".weight",), _patches(side)), Leaf("bias", (".bias",), SAME)


def dit_table(fields: Mapping[str, Any]) -> Table:
    """The names of DiT's files."""
    block, theirs = r"blocks_(?P<i>\d+)", r"blocks.\g<i>"
    return [
        Rule("x_embedder_proj", "x_embedder.proj", patch_kind(DiT(**fields).patch_size)),
        Rule(r"t_embedder_mlp_(\d)", r"t_embedder.mlp.\1", "linear"),
        Rule(rf"{block}/adaLN_modulation/1", rf"{theirs}.adaLN_modulation.1", "linear"),
        Rule(rf"{block}/(?P<part>attn|mlp)_(?P<map>\w+)", rf"{theirs}.\g<part>.\g<map>", "linear"),
        Rule("final_layer_adaLN_modulation/1", "final_layer.adaLN_modulation.1", "linear"),
        Rule("final_layer_linear", "final_layer.linear", "linear"),
    ]


def diffusers_table(fields: Mapping[str, Any]) -> Table:
    """The names of diffusers, where every block has a copy of the timestep's embedding."""
    dit = DiT(**fields)
    block, theirs = r"blocks_(?P<i>\d+)", r"transformer_blocks.\g<i>"
    return [
        Rule("x_embedder_proj", "pos_embed.proj", patch_kind(dit.patch_size)),
        *(
            Rule(
                f"t_embedder_mlp_{ours}",
                "transformer_blocks",
                _copies(f"norm1.emb.timestep_embedder.linear_{number}", dit.depth),
            )
            for ours, number in ((0, 1), (2, 2))
        ),
        Rule(rf"{block}/adaLN_modulation/1", rf"{theirs}.norm1.linear", "linear"),
        Rule(
            rf"{block}/attn_qkv",
            rf"{theirs}.attn1",
            joint_qkv(("to_q", "to_k", "to_v"), dit.num_heads, False),
        ),
        Rule(rf"{block}/attn_proj", rf"{theirs}.attn1.to_out.0", "linear"),
        Rule(rf"{block}/mlp_fc1", rf"{theirs}.ff.net.0.proj", "linear"),
        Rule(rf"{block}/mlp_fc2", rf"{theirs}.ff.net.2", "linear"),
        Rule("final_layer_adaLN_modulation/1", "proj_out_1", "linear"),
        Rule("final_layer_linear", "proj_out_2", "linear"),
    ]


def _copies(name: str, depth: int) -> Kind:
    """The kind of a linear map of which each of `depth` blocks has a copy."""

    def copied(layout: Layout) -> Layout:
        copies = f"{depth} copies, {layout.name}"
        return Layout(
            copies, lambda *w: layout.read(_same(name, w)), lambda k: layout.write(k) * depth
        )

    return tuple(
        Leaf(ours, tuple(f".{i}.{name}.{theirs}" for i in range(depth)), copied(layout))
        for ours, theirs, layout in (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
    )


def _same(name: str, copies: tuple[np.ndarray, ...]) -> np.ndarray:
    if any(not np.array_equal(copy, copies[0]) for copy in copies[1:]):
        raise ValueError(f"the blocks' copies of {name} differ, of which this model has one")
    return copies[0]


def shapes(fields: Mapping[str, Any], in_channels: int) -> Params:
    """The tree of parameter shapes of a transformer with these fields."""
    dit = DiT(**fields)
    return parameter_shapes(dit, array(1, dit.patch_size, dit.patch_size, in_channels), array(1))


def read_dit(path: Path, tensors: Mapping[str, Tensor]) -> Bundle:
    """Read a file of DiT or SiT; the shapes, or the released model of this width, show the fields.

    Both have the same tensors: a file is read as SiT's if its name begins with "SiT", as those of
    the released files do.
    """
    tensors, sit = dict(tensors), path.name.lower().startswith("sit")
    log.info("%s is read as a file of %s, by its name", path, "SiT" if sit else "DiT")
    width, channels, side, _ = tensors[PATCHES].shape
    if width not in _HEADS:
        raise ValueError(f"{path}: a DiT of width {width}; released: {', '.join(map(str, _HEADS))}")
    out = tensors["final_layer.linear.weight"].shape[0] // side**2
    fields = {
        "out_channels": channels,
        "patch_size": side,
        "width": width,
        "depth": count(tensors, "blocks."),
        "num_heads": _HEADS[width],
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "base_size": round(tensors[POSITIONS].shape[1] ** 0.5) * side,
        "sit": sit,
        "learned_variance": out == 2 * channels,
    }
    classes = conditioners_for(channels, channels, False, tensors.pop(LABELS, None))
    check_depth(path, fields, tensors)
    learned = {"learned_variance": True} if fields["learned_variance"] else {}
    tree = shapes(fields, channels)
    part = read_part(path, fields, dit_table(fields), tree, tensors, unused=(POSITIONS,))
    return Bundle(
        dit=part,
        conditioners=classes,
        diffusion=_SIT if sit else DIFFUSION,
        sampling=_SIT_SAMPLING if sit else {**_SAMPLING, **learned},
        image_size=8 * fields["base_size"],
        scale_factor=0.18215,
    )


def as_dit(bundle: Bundle, path: Path) -> dict[str, Tensor]:
    """The tensors of a file of DiT or SiT, not yet read; ValueError if the format can't hold it."""
    assert bundle.dit is not None
    dit = DiT(**bundle.dit.fields)
    if dit.sit != path.name.lower().startswith("sit"):
        raise ValueError(f"{path}: the name of SiT's files, and of no others, begins with SiT")
    if bundle.autoencoder is not None or bundle.conditioners.keys() - {"class_label"}:
        raise ValueError(
            "DiT's format holds the transformer and its classes alone; save it as orbax"
        )
    if dit.frequency_shift:
        log.warning("DiT's code has dit.frequency_shift=0: its pictures will differ slightly")
    if _HEADS.get(dit.width) != dit.num_heads:
        raise ValueError(f"DiT's format has no width={dit.width} with num_heads={dit.num_heads}")
    noise = _SIT if dit.sit else DIFFUSION
    if not same_noise(bundle.diffusion, noise):
        said = ", ".join(f"{name}={value}" for name, value in noise.items())
        raise ValueError(
            "DiT's format doesn't say the noise, which must be that of the released models "
            f"({said}); save it as orbax"
        )
    tensors = write_tensors(dit_table(bundle.dit.fields), bundle.dit.params)
    side = dit.base_size // dit.patch_size
    positions = in_memory(np.asarray(positions_2d(side, side, dit.width, side))[None])
    tensors |= {POSITIONS: bundle.dit.unused.get(POSITIONS, positions)}
    if "class_label" in bundle.conditioners:
        tensors[LABELS] = bundle.conditioners["class_label"].params[CLASS]
    return tensors


_LABELS = "norm1.emb.class_embedder.embedding_table.weight"


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of DiTTransformer2DModel, checked and with its defaults."""
    return _SETTINGS.complete(config, config["_class_name"])


def read_component(where: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bundle:
    """Read diffusers' transformer. Raises ValueError with the reason if it can't be read."""
    fields, values = _SETTINGS.read(config, config["_class_name"]), complete(config)
    tensors, channels = dict(tensors), values["in_channels"]
    check_depth(where, fields, tensors)
    width = fields["num_heads"] * values["attention_head_dim"]
    out = values["out_channels"] or channels
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"{where}: out_channels={out} of {channels} channels; supported: once or twice"
        )
    fields |= {
        "width": width,
        "frequency_shift": 1,
        "out_channels": channels,
        "learned_variance": out == 2 * channels,
    }
    tables = [tensors.pop(f"transformer_blocks.{i}.{_LABELS}") for i in range(fields["depth"])]
    copies = tuple(table.read() for table in tables)
    part = read_part(where, fields, diffusers_table(fields), shapes(fields, channels), tensors)
    classes = conditioners_for(channels, channels, False, in_memory(_same(_LABELS, copies)))
    return Bundle(dit=part, conditioners=classes, notes={"dit": dict(config)})


def as_component(bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the tensors of diffusers' transformer."""
    assert bundle.dit is not None
    fields = bundle.dit.fields
    dit, classes = DiT(**fields), bundle.conditioners.get("class_label")
    if classes is None or dit.mlp_ratio != 4 or dit.sit:
        raise ValueError("diffusers' DiT has classes, mlp_ratio=4 and no sit; save it as orbax")
    if dit.frequency_shift != 1:
        log.warning(
            "diffusers' DiT has other frequencies of the timestep (dit.frequency_shift=1, here "
            "%d): its pictures will differ slightly",
            dit.frequency_shift,
        )
    tensors = write_tensors(diffusers_table(fields), bundle.dit.params)
    tensors |= {
        f"transformer_blocks.{i}.{_LABELS}": classes.params[CLASS] for i in range(dit.depth)
    }
    config = {
        "_class_name": "DiTTransformer2DModel",
        **_SETTINGS.write(dit),
        "attention_head_dim": dit.width // dit.num_heads,
        "in_channels": dit.out_channels,
        "out_channels": dit.out_channels * (2 if dit.learned_variance else 1),
        "num_embeds_ada_norm": classes.params[CLASS].shape[0] - 1,
    }
    return config, tensors
