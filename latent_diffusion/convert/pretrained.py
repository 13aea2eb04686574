"""A conditioner's weights from wherever they lie: the frozen encoders of a run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latent_diffusion.convert import bert, clip_image, clip_text, text
from latent_diffusion.convert.bundle import Part, flat
from latent_diffusion.convert.orbax import read_orbax
from latent_diffusion.convert.tables import Table, below, read_tensors
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import find_weights, open_tensors
from latent_diffusion.runtime import workdir

Fields = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")


class Family(NamedTuple):
    """What is known of one conditioner's files.

    folders: where it lies within a pipeline's. prefixes: what names may begin with, in this order.
    from_shapes: fields of a file without config.json; None where shapes tell too little.
    """

    folders: tuple[str, ...]
    prefixes: tuple[str, ...]
    from_config: Callable[[Fields], dict[str, Any]]
    from_shapes: Callable[[Tensors], dict[str, Any]] | None
    table: Callable[[Fields, Tensors], Table]
    shapes: Callable[[Fields], Any]
    unused: Callable[[Fields], tuple[str, ...]]


def _clip_text_table(fields: Fields, tensors: Tensors) -> Table:
    is_open_clip = "positional_embedding" in tensors
    return (clip_text.open_clip_table if is_open_clip else clip_text.transformers_table)(fields)


def _text_table(fields: Fields, tensors: Tensors) -> Table:
    is_original = "transformer.token_emb.weight" in tensors
    return (text.compvis_table if is_original else text.diffusers_table)(fields)


FAMILIES = {
    "bert": Family(
        (),
        ("bert.",),
        bert.fields_from_config,
        None,
        lambda fields, _: bert.transformers_table(fields),
        bert.shapes,
        bert.unused,
    ),
    "clip_image": Family(
        ("image_encoder",),
        (),
        clip_image.fields_from_config,
        None,
        lambda fields, _: clip_image.transformers_table(fields),
        clip_image.shapes,
        clip_image.unused,
    ),
    "clip_text": Family(
        ("text_encoder",),
        ("cond_stage_model.", "model.", "transformer.text_model.", "text_model."),
        clip_text.fields_from_config,
        clip_text.fields_from_shapes,
        _clip_text_table,
        clip_text.shapes,
        clip_text.unused,
    ),
    "text": Family(
        ("bert",),
        ("cond_stage_model.",),
        text.fields_from_diffusers,
        text.fields_from_shapes,
        _text_table,
        text.shapes,
        lambda fields: text.UNUSED,
    ),
}


def read_pretrained(name: str, path: str | Path, given: Fields) -> Part:
    """The conditioner `name` from one of our workdirs, others' folder, or a weight file.

    given: fields that the user has decided on; the others are read off what lies there. Parameters
    stay unread. Raises ValueError that names the path, where it doesn't hold such an encoder.
    """
    path = Path(path)
    if (path / workdir.CONFIG).is_file() and not _is_others(path):
        return _of_workdir(name, path, given)
    if name not in FAMILIES:
        raise ValueError(
            f"pretrained.{name}={path} is no workdir, and other weights exist for "
            f"{', '.join(FAMILIES)} only"
        )
    family = FAMILIES[name]
    path = next((path / f for f in family.folders if (path / f).is_dir()), path)
    fields, weights = {}, path
    if path.is_dir():
        found = find_weights(path, STEMS)
        if found is None or not (path / "config.json").is_file():
            raise ValueError(f"pretrained.{name}={path} has no config.json with weights beside it")
        fields, weights = _from_config(family, path / "config.json"), found
    tensors: Tensors = open_tensors(weights).tensors
    for prefix in family.prefixes:
        tensors = below(tensors, prefix)
    if not fields:
        fields = _from_shapes(name, family, path, tensors)
    fields = {**fields, **given}
    shapes = {k: leaf.shape for k, leaf in flat(family.shapes(fields)).items()}
    table, unused = family.table(fields, tensors), family.unused(fields)
    return Part(fields, read_tensors(table, shapes, tensors, str(path), unused))


def _is_others(path: Path) -> bool:
    """Whether config.json is that of transformers or diffusers; a workdir's has a task."""
    return "task" not in _load(path / workdir.CONFIG)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    return content if isinstance(content, dict) else {}


def _of_workdir(name: str, path: Path, given: Fields) -> Part:
    conditioners = read_orbax(path).conditioners
    if name not in conditioners:
        has = ", ".join(conditioners) or "none"
        raise ValueError(f"pretrained.{name}={path} has no conditioner of this name; it has {has}")
    part = conditioners[name]
    return Part({**part.fields, **given}, part.params)


def _from_config(family: Family, path: Path) -> dict[str, Any]:
    config = _load(path)
    try:
        return family.from_config(config)
    except KeyError as error:
        raise ValueError(f"{path} is of another kind of model: it has no {error}") from None


def _from_shapes(name: str, family: Family, path: Path, tensors: Tensors) -> dict[str, Any]:
    if family.from_shapes is None:
        raise ValueError(f"pretrained.{name}={path} is a bare file; give a folder with config.json")
    try:
        return family.from_shapes(tensors)
    except KeyError as error:
        raise ValueError(f"{path} holds no {name}: it has no tensor {error}") from None
