"""Files of T2I-Adapters: the original's, and diffusers' folders."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.struct
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict

from latent_diffusion.convert.adapters.adapter import Adapter, arrays_of, frozen
from latent_diffusion.convert.bundle import read_part
from latent_diffusion.convert.components import open_weights, write_folder
from latent_diffusion.convert.settings import Settings
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import Rule, Table, prefixed, write_tensors
from latent_diffusion.core.types import Params
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.nets.t2i_adapter import T2IAdapter
from latent_diffusion.nets.unet import UNet

CLASS = "T2IAdapter"
_KINDS = {"full_adapter": "full", "full_adapter_xl": "full_xl", "light_adapter": "light"}
_SETTINGS = Settings(
    names={
        "num_res_blocks": "num_res_blocks",
        "downscale_factor": "downscale",
        "in_channels": "in_channels",
    },
    defaults={"channels": (320, 640, 1280, 1280), "num_res_blocks": 2, "downscale_factor": 8},
    checked={"in_channels": (3, 1), "adapter_type": tuple(_KINDS)},
)


class T2IWeights(Adapter):
    """A T2I-Adapter: its parameters by path, as float32 arrays. fields: those of `T2IAdapter`."""

    argument: ClassVar[str] = "controls"
    params: Mapping[str, Any]
    fields: Mapping[str, Any] = flax.struct.field(pytree_node=False)
    config: Mapping[str, Any] = flax.struct.field(pytree_node=False, default=FrozenDict())

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of its features: one for each level of the U-Net, and perhaps the middle's."""
        return tuple(f"features.{i}" for i in range(len(self.module.channels)))

    @property
    def module(self) -> T2IAdapter:
        """The net."""
        return T2IAdapter(**self.fields)

    def tree(self) -> Params:
        """The parameters for the net."""
        return unflatten_dict(dict(self.params), sep="/")

    def places(self, module: Any, downsampling: int) -> tuple[int, ...]:
        """For each of its features, the place in `Conditioning.features` of a U-Net.

        As in diffusers, a level's features are added to its last block with attention, or, in a
        level without attention, to the output of the level. Raises ValueError where the features
        don't fit the U-Net.
        """
        if not isinstance(module, UNet):
            raise ValueError(f"{self.path}: a T2I-Adapter steers a U-Net, which this model isn't")
        blocks, levels = module.num_res_blocks + 1, len(module.channel_mult)
        unet_features = []
        for level, mult in enumerate(module.channel_mult):
            inside = 2**level in module.attention_resolutions or level == levels - 1
            shrink = downsampling * 2 ** (level if inside else level + 1)
            place = blocks * level + (blocks - 1 if inside else blocks)
            unet_features.append((place, mult * module.model_channels, shrink))
        unet_features.append((blocks * levels, *unet_features[-1][1:]))  # the middle
        net = self.module
        for i, feature in enumerate(zip(net.channels, net.shrinks, strict=True)):
            if i == len(unet_features) or feature != unet_features[i][1:]:
                expected = unet_features[i][1:] if i < len(unet_features) else "no more"
                raise ValueError(
                    f"{self.path}: features {i} have (width, pixels for each place) {feature}, "
                    f"those of the U-Net {expected}; it is another one's"
                )
        return tuple(place for place, *_ in unet_features[: len(net.channels)])


def is_t2i(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are a T2I-Adapter of the original's."""
    marks = ("body.0.block1.weight", "body.0.body.0.block1.weight")
    return any(name in tensors for name in marks)


def read_original(path: Path, tensors: Mapping[str, Tensor]) -> T2IWeights:
    """Read a file of the original's."""
    light = "body.0.out_conv.weight" in tensors
    if light:
        count = len({name.split(".")[1] for name in tensors})
        channels = tuple(tensors[f"body.{i}.out_conv.weight"].shape[0] for i in range(count))
        blocks = len({name.split(".")[3] for name in tensors if name.startswith("body.0.body.")})
        first = tensors["body.0.in_conv.weight"]
    else:
        count, blocks = len({n.split(".")[1] for n in tensors if n.startswith("body.")}), 2
        last = (f"body.{i * blocks}.block1.weight" for i in range(count // blocks))
        channels = tuple(tensors[name].shape[0] for name in last)
        first = tensors["conv_in.weight"]
    in_channels = 1 if first.shape[1] % 3 else 3
    downscale = math.isqrt(first.shape[1] // in_channels)
    kind = "light" if light else "full_xl" if downscale == 16 else "full"
    fields = {"kind": kind, "channels": channels, "num_res_blocks": blocks, "downscale": downscale}
    fields["in_channels"] = in_channels
    return _read(path, path, fields, _original(kind, blocks), tensors)


def read_folder(path: Path, config: Mapping[str, Any]) -> T2IWeights:
    """Read a folder of diffusers' with a T2IAdapter."""
    fields = fields_from_diffusers(config)
    weights, tensors = open_weights(path, None)
    adapter = _read(path, weights, fields, _diffusers(), tensors)
    return adapter.replace(config=frozen(config))


def fields_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from a config.json of T2IAdapter; ValueError for an unsupported setting."""
    values, fields = _SETTINGS.complete(config, CLASS), _SETTINGS.read(config, CLASS)
    fields["kind"], channels = _KINDS[values["adapter_type"]], tuple(values["channels"])
    # A light adapter has a further level, as wide as the last one of the setting.
    fields["channels"] = (*channels, channels[-1]) if fields["kind"] == "light" else channels
    return fields


def _read(
    path: Path, where: Path, fields: dict[str, Any], table: Table, tensors: Mapping[str, Tensor]
) -> T2IWeights:
    net = T2IAdapter(**fields)
    if (blocks := len(net.channels) * net.num_res_blocks) > len(tensors):  # before shapes
        raise ValueError(f"{where}: {len(tensors)} tensors can't be {blocks} blocks")
    side = net.shrinks[-1]
    shapes = parameter_shapes(net, array(1, side, side, 3))
    part = read_part(where, fields, table, shapes, tensors)
    return T2IWeights(path=str(path), params=arrays_of(part), fields=frozen(fields))


def _diffusers() -> Table:
    return prefixed(
        [
            Rule("conv_in", "conv_in", "conv"),
            Rule(r"body_(\d+)_(in_conv|out_conv)", r"body.\1.\2", "conv"),
            Rule(r"body_(\d+)_resnets_(\d+)_(block\d)", r"body.\1.resnets.\2.\3", "conv"),
        ],
        "adapter.",
    )


def _original(kind: str, blocks: int) -> Table:
    if kind == "light":
        return [
            Rule(r"body_(\d+)_(in_conv|out_conv)", r"body.\1.\2", "conv"),
            Rule(r"body_(\d+)_resnets_(\d+)_(block\d)", r"body.\1.body.\2.\3", "conv"),
        ]
    table = [Rule("conv_in", "conv_in", "conv")]
    for level in range(8):
        first = level * blocks
        table.append(Rule(f"body_{level}_in_conv", f"body.{first}.in_conv", "conv"))
        table += [
            Rule(rf"body_{level}_resnets_{j}_(block\d)", rf"body.{first + j}.\1", "conv")
            for j in range(blocks)
        ]
    return table


def write_t2i(adapter: T2IWeights, path: Path, format: str) -> None:
    """Write an adapter as the original's file ("compvis") or as diffusers' folder."""
    tensors = {k: in_memory(np.asarray(x)) for k, x in adapter.params.items()}
    net = adapter.module
    if format == "compvis":
        if net.kind != "light" and net.num_res_blocks != 2:
            raise ValueError(
                f"{adapter.path} has num_res_blocks={net.num_res_blocks}, and the original's "
                "files, which don't say it, have 2: save it as diffusers"
            )
        write_safetensors(path, write_tensors(_original(net.kind, net.num_res_blocks), tensors))
        return
    if format != "diffusers":
        raise ValueError(f"unknown format {format!r} of an adapter; known: compvis, diffusers")
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    channels = net.channels[:-1] if net.kind == "light" else net.channels
    names = {"_class_name": CLASS, "adapter_type": kinds[net.kind]}
    config = dict(adapter.config) or {**_SETTINGS.write(net), **names, "channels": channels}
    write_folder(path, config, write_tensors(_diffusers(), tensors))
