"""First stages and conditions of taming-transformers' priors: tensors and yaml."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert import autoencoder, text
from latent_diffusion.convert.bundle import Bundle, Part, read_part
from latent_diffusion.convert.settings import Settings
from latent_diffusion.convert.tables import within, write_tensors
from latent_diffusion.core.types import lookup
from latent_diffusion.files.tensor import Tensor

Params = Mapping[str, Any]
Written = tuple[dict[str, Tensor], str, Any]  # tensors, cond_stage_key, cond_stage_config
_LOSS = (r"loss\..*",)
_COLOURS = (r"colorize",)  # a random map from classes to colours, for pictures in logs
_TARGET = "taming.models.vqgan.VQModel"
_MODULE = Settings(
    required={"target": _TARGET}, optional={"params": {}}, harmless=("base_learning_rate",)
)


def class_and_settings(config: Any, owner: str, classes: Mapping[str, Any]) -> tuple[str, Params]:
    """The class and the settings of a part of a yaml; ValueError for a class not in `classes`.

    owner: the part's name in the yaml.
    """
    values = _MODULE.complete(config, owner)
    lookup(classes, values["target"], f"target of {owner}")
    return values["target"], values["params"] or {}


def read_vq(path: Path, tensors: Mapping[str, Tensor], config: Params) -> Part:
    """Read a first stage, of pictures or of maps. config: its section of the yaml."""
    params = _MODULE.complete(config, "VQModel")["params"] or {}
    params = {k: value for k, value in params.items() if k != "n_labels"}
    fields = autoencoder.fields_from_yaml({**config, "params": params})
    table, tree = autoencoder.compvis_table(fields), autoencoder.shapes(fields)
    return read_part(path, fields, table, tree, tensors, unused=_COLOURS, ignored=_LOSS)


def read_condition(
    path: Path, tensors: Mapping[str, Tensor], params: Params, bundle: Bundle
) -> dict[str, Part]:
    """Read the conditioner that the yaml's `model.params` describe; bundle: the other parts."""
    config = params.get("cond_stage_config")
    if params["unconditional"] or config == "__is_unconditional__":
        return {"start": Part({"token": params["sos_token"]}, {})}
    if not isinstance(config, Mapping):
        raise ValueError(f"cond_stage_config={config!r}; supported: {', '.join(_READERS)}")
    target, condition_params = class_and_settings(config, "cond_stage_config", _READERS)
    settings, reader = _READERS[target]
    if settings is not None:
        condition_params = settings.complete(condition_params, target.rpartition(".")[2])
    config = {"target": target, "params": condition_params}
    return reader(path, tensors, {**params, "cond_stage_config": config}, bundle)


def _labels(path: Path, tensors: Any, params: Params, bundle: Bundle) -> dict[str, Part]:
    classes = params["cond_stage_config"]["params"]["n_classes"]
    return {"class_token": Part({"num_classes": classes}, {})}


def _start(path: Path, tensors: Any, params: Params, bundle: Bundle) -> dict[str, Part]:
    return {"start": Part({"token": params["cond_stage_config"]["params"]["sos_token"]}, {})}


def _coordinates(path: Path, tensors: Any, params: Params, bundle: Bundle) -> dict[str, Part]:
    settings = params["cond_stage_config"]["params"]
    fields = {"num_places": settings["n_embed"], "factor": settings["down_factor"]}
    return {"coordinates": Part(fields, {})}


def _boxes(path: Path, tensors: Any, params: Params, bundle: Bundle) -> dict[str, Part]:
    if (key := params.get("cond_stage_key")) != "objects_bbox":
        raise ValueError(f"cond_stage_key={key!r} of DummyCondStage; supported: 'objects_bbox'")
    assert bundle.prior is not None
    fields = bundle.prior.fields
    length = fields["max_length"] - int(np.prod(np.broadcast_to(bundle.latent_size, 2)))
    sizes = {"vocab_size": fields["vocab_size"], "max_length": length}
    return {"layout_tokens": Part({**sizes, "has_null": False}, {})}


def _map(path: Path, tensors: Any, params: Params, bundle: Bundle) -> dict[str, Part]:
    if (key := params.get("cond_stage_key")) not in ("depth", "segmentation"):
        raise ValueError(f"cond_stage_key={key!r} of VQModel; supported: 'depth', 'segmentation'")
    part = read_vq(path, tensors, params["cond_stage_config"])
    inner = {f"autoencoder/{name}": tensor for name, tensor in part.params.items()}
    return {"code_map": Part({"key": key, "autoencoder": part.fields}, inner, part.unused)}


_ONE = {"quantize_interface": (True,)}
# The settings and the reader of each class of conditions; `read_vq` checks those of a VQModel.
_READERS: dict[
    str, tuple[Settings | None, Callable[[Path, Any, Params, Bundle], dict[str, Part]]]
] = {
    "taming.modules.util.Labelator": (Settings(required={"n_classes": 9}, checked=_ONE), _labels),
    "taming.modules.util.SOSProvider": (Settings(required={"sos_token": 0}, checked=_ONE), _start),
    "taming.modules.misc.coord.CoordStage": (
        Settings(required={"n_embed": 1024, "down_factor": 16}),
        _coordinates,
    ),
    "taming.models.dummy_cond_stage.DummyCondStage": (
        Settings(checked={"conditional_key": ("objects_bbox",)}),
        _boxes,
    ),
    _TARGET: (None, _map),
    "taming.models.vqgan.VQSegmentationModel": (None, _map),
}


# ---------------------------------------------------------------------------------------- writing


def write_vq(part: Part) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a first stage without prefix, and its yaml."""
    config = autoencoder.yaml_from_fields(part.fields)
    params = config["params"]
    params["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    for name, tensor in part.unused.items():
        params[f"{name}_nlabels"] = tensor.shape[1]
    tensors = write_tensors(autoencoder.compvis_table(part.fields), part.params)
    target = _TARGET if part.fields["regularization"] == "vq" else config["target"]
    return {**tensors, **part.unused}, {"target": target, "params": params}


def _write_map(part: Part) -> Written:
    inner = Part(part.fields["autoencoder"], within(part.params, "autoencoder/"), part.unused)
    tensors, config = write_vq(inner)
    return tensors, part.fields["key"], config


def _module(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params}


def _write_layout(part: Part) -> Written:
    text.of_corners(part.fields)  # refuses what taming can't express
    module = "taming.models.dummy_cond_stage.DummyCondStage"
    return {}, "objects_bbox", _module(module, conditional_key="objects_bbox")


WRITERS: dict[str, Callable[[Part], Written]] = {
    "start": lambda part: ({}, "image", "__is_unconditional__"),
    "class_token": lambda part: (
        *({}, "class_label"),
        _module("taming.modules.util.Labelator", n_classes=part.fields["num_classes"]),
    ),
    "coordinates": lambda part: (
        *({}, "coord"),
        _module(
            "taming.modules.misc.coord.CoordStage",
            n_embed=part.fields["num_places"],
            down_factor=part.fields["factor"],
        ),
    ),
    "layout_tokens": _write_layout,
    "code_map": _write_map,
}
