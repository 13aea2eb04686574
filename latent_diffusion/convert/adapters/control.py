"""Files of control nets: the original's (whole, or differences to a U-Net), diffusers' folders."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict

from latent_diffusion.convert import unet, unet_compvis, unet_diffusers
from latent_diffusion.convert.adapters.adapter import Adapter, arrays_of, frozen
from latent_diffusion.convert.bundle import Part, check_depth, flat, input_widths, read_part
from latent_diffusion.convert.components import open_weights, write_folder
from latent_diffusion.convert.experiment import read_config
from latent_diffusion.convert.settings import Settings, check_groups
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import Rule, Table, within, write_tensors
from latent_diffusion.core.types import Params, module_fields
from latent_diffusion.files.original_yaml import read_yaml
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.nets.conditioners.sizes import Sizes
from latent_diffusion.nets.control import HINT, ControlNet, control_net
from latent_diffusion.nets.eight_bits import layer_params
from latent_diffusion.nets.unet import UNet
from latent_diffusion.runtime import workdir

log = logging.getLogger(__name__)

CLASS = "ControlNetModel"
_PREFIX = "control_model."
_DIFFERENCE = "difference"  # the tensor that marks a file of differences to a U-Net
_CONV_IN = "input_blocks_0_0/kernel"
_SETTINGS = Settings(  # those that a control net has beside the U-Net's
    defaults={
        "conditioning_embedding_out_channels": (16, 32, 96, 256),
        "global_pool_conditions": False,
    },
    checked={
        "conditioning_channels": (3,),
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
        "num_class_embeds": (None,),
    },
)
_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)


class ControlWeights(Adapter):
    """A control net: its parameters by path, as float32 arrays.

    fields: of `ControlNet`; in use, fields that are also the U-Net's have the U-Net's values.
    difference: parameters that the U-Net also has are to be added to the U-Net's. bgr: hints have
    their channels in the order BGR. linear, time_width: see `Bundle`. config: the config.json of
    diffusers' folder, where the net comes from one.
    """

    argument: ClassVar[str] = "controls"
    params: Mapping[str, Any]
    fields: Mapping[str, Any] = flax.struct.field(pytree_node=False)
    difference: bool = flax.struct.field(pytree_node=False, default=False)
    bgr: bool = flax.struct.field(pytree_node=False, default=False)
    linear: bool = flax.struct.field(pytree_node=False, default=False)
    time_width: int | None = flax.struct.field(pytree_node=False, default=None)
    config: Mapping[str, Any] = flax.struct.field(pytree_node=False, default=FrozenDict())

    @property
    def blocks(self) -> tuple[str, ...]:
        """diffusers' names of the blocks from which the residuals come."""
        return tuple(residual_names(ControlNet(**self.fields)))

    def net(self, module: Any, params: Params, downsampling: int) -> ControlNet:
        """The net for a U-Net with these parameters; ValueError where it is for another U-Net.

        downsampling: the factor f of the first stage.
        """
        if not isinstance(module, UNet):
            raise ValueError(f"{self.path}: a control net steers a U-Net, which this model isn't")
        unet_params, concat = flat(params), True
        for path, parameter in self.params.items():
            if path.startswith((HINT, "zero_convs", "middle_block_out")):
                continue
            if path not in unet_params:
                raise ValueError(f"{self.path}: the U-Net has no {path}; the net is for another")
            if path == _CONV_IN and parameter.shape != unet_params[path].shape:
                concat = False  # as in diffusers, for U-Nets whose input is more than the latent
                sides, unet_sides = (np.delete(x.shape, 2) for x in (parameter, unet_params[path]))
                fits = parameter.shape[2] < unet_params[path].shape[2] and all(sides == unet_sides)
            else:
                fits = parameter.shape == unet_params[path].shape
            if not fits:
                raise ValueError(
                    f"{self.path}: {path} is {parameter.shape}, that of the U-Net "
                    f"{unet_params[path].shape}"
                )
        hint_fields = {name: self.fields[name] for name in ("hint_channels", "global_pooling")}
        shrinks = 2 ** (len(hint_fields["hint_channels"]) - 1)
        if shrinks != downsampling:
            raise ValueError(
                f"{self.path}: its hints shrink by {shrinks}, the pictures by f={downsampling}"
            )
        net = control_net(module, downsampling, takes_concat=concat, **hint_fields)
        if len(self.blocks) != len(list(residual_names(net))):
            raise ValueError(
                f"{self.path}: it has {len(self.blocks)} outputs for a U-Net with "
                f"{len(list(residual_names(net)))} places"
            )
        return net

    def tree(self, params: Params) -> Params:
        """The parameters of a `ControlNet` and its `HintNet`. params: the U-Net's parameters."""
        base = flat(params) if self.difference else {}
        whole = {path: jnp.asarray(x) for path, x in self.params.items()}
        for path in whole.keys() & base.keys():
            whole[path] += _of_latent(path, base[path], whole[path])
        return unflatten_dict(whole, sep="/")


def _of_latent(path: str, parameter: Any, like: Any) -> Any:
    """The U-Net's parameter; of a convolution of further channels, the part for the latent."""
    parameter = layer_params(parameter)
    return parameter[:, :, : like.shape[2]] if path == _CONV_IN else parameter


def residual_names(net: UNet) -> Iterator[str]:
    """diffusers' names of the blocks whose outputs are skip connections, and of the middle."""
    yield "conv_in"
    levels = len(net.channel_mult)
    for level in range(levels):
        yield from (f"down_blocks.{level}.resnets.{i}" for i in range(net.num_res_blocks))
        if level != levels - 1:
            yield f"down_blocks.{level}.downsamplers.0"
    yield "mid_block"


# --------------------------------------------------------------------------------------- reading


def is_control(names: Any) -> bool:
    """Whether tensors of these names are a control net of the original's, or of diffusers'."""
    ends = ("zero_convs.0.0.weight", "controlnet_cond_embedding.conv_in.weight")
    return any(name in (*ends, _PREFIX + ends[0]) for name in names)


def read_original(path: Path, tensors: Mapping[str, Tensor]) -> ControlWeights:
    """Read a file of the original's: `control_model.…`, alone or beside a whole model."""
    if "controlnet_cond_embedding.conv_in.weight" in tensors:
        raise ValueError(f"{path} is diffusers' control net without settings: give its folder")
    weights = within(tensors, _PREFIX) or {k: t for k, t in tensors.items() if k != _DIFFERENCE}
    fields: dict[str, Any] = unet_compvis.fields_from_shapes(weights)
    context = unet_compvis.context_dim(weights)
    # A net is used with its U-Net's number of heads, which the file doesn't state.
    released = all(mult * fields["model_channels"] % 64 == 0 for mult in fields["channel_mult"])
    heads = {"num_head_channels": 64} if released else {"num_heads": 1}
    fields |= {"num_heads": 8} if context == 768 else heads
    hints = sorted(int(name.split(".")[1]) for name in weights if name.startswith(f"{HINT}."))[::2]
    widths = [weights[f"{HINT}.{i}.weight"].shape[0] for i in hints[:-1]]
    fields["hint_channels"] = tuple(widths[::2])
    projection = weights.get("middle_block.1.proj_in.weight")
    linear = projection is not None and len(projection.shape) == 2
    widths_of_inputs = unet_compvis.widths(weights, {})
    part = _part(path, fields, _original(fields, linear), weights, widths_of_inputs)
    further = {"linear": linear, "difference": _DIFFERENCE in tensors}
    part = replace(part, fields={**part.fields, "global_pooling": _is_pooled(path)})
    return _weights(path, part, **further)


def _is_pooled(path: Path) -> bool:
    """Whether an original net's residuals are averaged: its yaml says so, or its name.

    The tensors don't show it. The released net of this kind is control_v11e_sd15_shuffle.
    """
    yaml = path.with_suffix(".yaml")
    if yaml.is_file():
        params = read_yaml(yaml).get("params") or {}
        return bool(params.get("global_average_pooling", False))
    pooled = path.stem.endswith(("_shuffle", "_shuffle_fp16"))
    if pooled:
        log.info("%s: its residuals are averaged over positions, as its name says", path)
    return pooled


def read_folder(path: Path, config: Mapping[str, Any]) -> ControlWeights:
    """Read a folder of diffusers' with a ControlNetModel."""
    fields, widths, further = from_diffusers(config)
    weights, tensors = open_weights(path, None)
    table = _diffusers(fields, further["linear"], further["time_width"] is not None)
    part = _part(weights, fields, table, tensors, widths)
    return _weights(path, part, config=frozen(config), **further)


def from_diffusers(
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], unet.Widths, dict[str, Any]]:
    """Read a config.json of ControlNetModel.

    Returns the fields of `ControlNet`, the widths of its inputs, and the further fields of
    `ControlWeights` by name. Raises ValueError for a setting that our control net can't express.
    """
    control_settings = {
        k: v for k, v in config.items() if k in {**_SETTINGS.defaults, **_SETTINGS.checked}
    }
    values = _SETTINGS.complete(control_settings, CLASS)
    rest = {k: v for k, v in config.items() if k not in control_settings} | {
        "_class_name": "UNet2DConditionModel"
    }
    rest["up_block_types"] = _mirrored(config.get("down_block_types", _DOWN))
    fields, unet_values = unet_diffusers.fields_from_diffusers(rest), unet_diffusers.complete(rest)
    fields["hint_channels"] = tuple(values["conditioning_embedding_out_channels"])
    fields["global_pooling"] = values["global_pool_conditions"]
    text_time = unet_diffusers.is_text_time(unet_values)
    beside = {
        "linear": bool(unet_values["use_linear_projection"]),
        "time_width": unet_values["addition_time_embed_dim"] if text_time else None,
        "bgr": values["controlnet_conditioning_channel_order"] == "bgr",
    }
    return fields, unet_diffusers.input_widths(unet_values), beside


def read_workdir(path: Path) -> ControlWeights:
    """The control net that was trained in a workdir: the average of its parameters."""
    config = read_config(path)
    params = flat(workdir.open_entry(path, "ema_params")["control"])
    arrays = {k: np.asarray(x, np.float32) for k, x in params.items()}
    convs = sum(name.startswith(f"{HINT}/") and name.endswith("/kernel") for name in arrays)
    widths = (arrays[f"{HINT}/conv_{2 * i}/kernel"].shape[3] for i in range(0, convs - 1, 2))
    fields = {**module_fields(config.unet), "hint_channels": tuple(widths), "global_pooling": False}
    sizes = config.conditioners.get("sizes")
    return ControlWeights(
        path=str(path),
        params=arrays,
        fields=frozen(fields),
        linear=sizes is not None,
        time_width=None if sizes is None else Sizes(**sizes).width,
    )


def _mirrored(downs: Any) -> list[str]:
    return [str(name).replace("Down", "Up") for name in reversed(downs)]


def _part(
    where: Path, fields: Mapping[str, Any], table: Table, tensors: Mapping[str, Tensor], widths: Any
) -> Part:
    check_depth(where, fields, tensors)
    if 2 * len(fields.get("hint_channels", ())) > len(tensors):
        raise ValueError(f"{where}: {len(tensors)} tensors can't be the layers of its hints")
    return read_part(where, fields, table, shapes(fields, *widths), tensors)


def _weights(path: Path, part: Part, **further: Any) -> ControlWeights:
    params = arrays_of(part)
    fields = {"hint_channels": (16, 32, 96, 256), "global_pooling": False, **part.fields}
    return ControlWeights(path=str(path), params=params, fields=frozen(fields), **further)


def shapes(
    fields: Mapping[str, Any], in_channels: int, context_dim: int | None, vector_dim: int | None
) -> Params:
    """The tree of parameter shapes of a control net and its hint net."""
    net = ControlNet(**fields)
    z_t, t, conditioning = unet.input_shapes(net, in_channels, context_dim, vector_dim)
    hint = array(*z_t.shape[:3], net.model_channels)
    hint_net = parameter_shapes(net.hint_net, array(1, 64, 64, 3))
    return {**parameter_shapes(net, z_t, t, conditioning, hint), HINT: hint_net}


def _original(fields: Mapping[str, Any], linear: bool) -> Table:
    return [
        Rule(r"zero_convs_(\d+)_0", r"zero_convs.\1.0", "conv"),
        Rule("middle_block_out_0", "middle_block_out.0", "conv"),
        Rule(rf"{HINT}/conv_(\d+)", rf"{HINT}.\1", "conv"),
        *unet.compvis_table(_of_unet(fields), linear),
    ]


def _diffusers(fields: Mapping[str, Any], linear: bool, text_time: bool) -> Table:
    last = 2 * (len(fields["hint_channels"]) - 1)
    names = {
        0: "conv_in",
        **{i: f"blocks.{i - 1}" for i in range(1, last + 1)},
        last + 1: "conv_out",
    }
    hints = [
        Rule(f"{HINT}/conv_{2 * i}", f"controlnet_cond_embedding.{name}", "conv")
        for i, name in names.items()
    ]
    return [
        *hints,
        Rule(r"zero_convs_(\d+)_0", r"controlnet_down_blocks.\1", "conv"),
        Rule("middle_block_out_0", "controlnet_mid_block", "conv"),
        *unet.diffusers_table(_of_unet(fields), linear, text_time),
    ]


def _of_unet(fields: Mapping[str, Any]) -> dict[str, Any]:
    control_only = ("hint_channels", "global_pooling", "takes_concat")
    return {name: value for name, value in fields.items() if name not in control_only}


# --------------------------------------------------------------------------------------- writing


def write_control(adapter: ControlWeights, path: Path, format: str) -> None:
    """Write a control net as the original's file ("compvis") or as diffusers' folder.

    A difference to a U-Net stays a difference; for diffusers, which has no such files, it is
    refused with a ValueError. The original's file can't say that residuals are averaged.
    """
    tensors = {k: in_memory(np.asarray(x)) for k, x in adapter.params.items()}
    fields = _of_unet(adapter.fields)
    if format == "compvis":
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: the name of a control net's file ends in .safetensors")
        check_groups(ControlNet(**adapter.fields))
        if adapter.fields["global_pooling"]:
            raise ValueError(
                f"{adapter.path} averages its residuals (global_pool_conditions), which the "
                "original's files can't say; write it for diffusers"
            )
        if adapter.bgr:
            first = f"{HINT}/conv_0/kernel"
            tensors[first] = in_memory(np.asarray(adapter.params[first])[:, :, ::-1].copy())
        written = write_tensors(_original(adapter.fields, adapter.linear), tensors)
        named = {_PREFIX + name: t for name, t in written.items()}
        if adapter.difference:
            named[_DIFFERENCE] = in_memory(np.zeros(0, np.float32))
        write_safetensors(path, named)
        return
    if format != "diffusers":
        raise ValueError(f"unknown format {format!r} of a control net; known: compvis, diffusers")
    if adapter.difference:
        raise ValueError(f"{adapter.path} is a difference to a U-Net; diffusers has no such files")
    config = dict(adapter.config) or _config(adapter, input_widths(Part(fields, tensors)))
    table = _diffusers(adapter.fields, adapter.linear, adapter.time_width is not None)
    write_folder(path, config, write_tensors(table, tensors))


def _config(adapter: ControlWeights, widths: unet.Widths) -> dict[str, Any]:
    fields = _of_unet(adapter.fields)
    unet_config = unet_diffusers.diffusers_from_fields(
        fields, widths, adapter.linear, None, adapter.time_width
    )
    for name in ("up_block_types", "out_channels", "sample_size", "dropout", "center_input_sample"):
        unet_config.pop(name, None)
    return {
        **unet_config,
        "_class_name": CLASS,
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": adapter.fields["hint_channels"],
        "controlnet_conditioning_channel_order": "bgr" if adapter.bgr else "rgb",
        "global_pool_conditions": adapter.fields["global_pooling"],
    }
