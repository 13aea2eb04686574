"""Read, merge and write adapters: small changes of a model in separate files, such as LoRA.

`names` maps names of modules to our parameters, `optimisation.deltas` has the formulas of changes,
and `adapter` applies these formulas to the parameters.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.adapters import control, t2i_adapter
from latent_diffusion.convert.adapters.adapter import (
    Adapter,
    Change,
    LowRank,
    Rows,
    Weight,
    adapted,
    weights_of,
)
from latent_diffusion.convert.adapters.control import ControlWeights, write_control
from latent_diffusion.convert.adapters.image_prompt import (
    ImagePrompt,
    is_image_prompt,
    read_image_prompt,
    write_image_prompt,
)
from latent_diffusion.convert.adapters.reading import (
    open_adapter,
    read_low_rank,
    read_pictured,
    read_weights,
)
from latent_diffusion.convert.adapters.t2i_adapter import T2IWeights, write_t2i
from latent_diffusion.convert.adapters.words import (
    Words,
    is_words,
    own_word,
    read_words,
    write_own,
    write_words,
)
from latent_diffusion.convert.adapters.writing import (
    of_workdir,
    write_diffusers_lora,
    write_kohya_lora,
)
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.convert.orbax import read_orbax
from latent_diffusion.core.types import lookup
from latent_diffusion.files.reading import read_json, reading
from latent_diffusion.files.tensor import Tensor

__all__ = [
    "Adapter",
    "Change",
    "ControlWeights",
    "ImagePrompt",
    "Rows",
    "T2IWeights",
    "Weight",
    "Words",
    "adapted",
    "read_adapter",
    "read_pictured",
    "read_weights",
    "weights_of",
    "with_lora",
    "with_loras",
    "write_control",
    "write_diffusers_lora",
    "write_image_prompt",
    "write_kohya_lora",
    "write_own",
    "write_t2i",
    "write_words",
]


def read_adapter(
    path: str | os.PathLike,
    word: str | None = None,
    image_encoder: str | os.PathLike | None = None,
) -> Adapter:
    """Read the adapter at `path` into NumPy arrays. ValueError for kinds that can't be read.

    word: how prompts spell the word of a textual inversion; default: as the file names it.
    image_encoder: the folder of an IP-Adapter's image encoder; default: the folder beside the file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    with reading(path):
        adapter = _read(path, word, image_encoder)
        if word is not None and not isinstance(adapter, Words):
            raise ValueError(f"it is no textual inversion, and word={word!r} names one")
        if image_encoder is not None and not isinstance(adapter, ImagePrompt):
            raise ValueError(f"it is no IP-Adapter, which image_encoder={image_encoder} is for")
        return adapter


_FOLDERS: dict[str, Callable[[Path, dict[str, Any]], Adapter]] = {
    control.CLASS: control.read_folder,
    t2i_adapter.CLASS: t2i_adapter.read_folder,
}


def _read(path: Path, word: str | None, image_encoder: str | os.PathLike | None) -> Adapter:
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("_class_name") is not None:
        return lookup(_FOLDERS, config["_class_name"], "adapter")(path, config)
    if "task" in config:
        return _read_workdir(path, config, word)
    file, settings = open_adapter(path)
    if control.is_control(file.tensors):
        return control.read_original(path, file.tensors)
    if t2i_adapter.is_t2i(file.tensors):
        return t2i_adapter.read_original(path, file.tensors)
    if is_image_prompt(file.tensors):
        return read_image_prompt(path, file.tensors, image_encoder)
    if is_words(file):
        return read_words(path, file, word)
    return read_low_rank(path, file, settings)


def _read_workdir(path: Path, config: dict[str, Any], word: str | None) -> Adapter:
    """The control net, the word or the LoRA that was trained in a workdir."""
    if config.get("control"):
        return control.read_workdir(path)
    bundle = read_orbax(path)
    if config.get("textual_inversion", {}).get("word"):
        own = own_word(bundle)
        return own.replace(path=str(path), word=word or own.word)
    if not bundle.lora:
        raise ValueError("this workdir is a model, no adapter: give it to load")
    return LowRank(path=str(path), modules=of_workdir(bundle))


def with_lora(bundle: Bundle, path: Path, weight: Weight = 1.0) -> Bundle:
    """Return the model with `weight` times an adapter added to each parameter as it is read."""
    return with_loras(bundle, [(path, weight)])


def with_loras(bundle: Bundle, files: Iterable[tuple[str | os.PathLike, Weight]]) -> Bundle:
    """Return the model plus a sum of adapters, each times its weight.

    The change by each adapter is computed from the model's own parameters.
    """
    changes_of: dict[str, list[tuple[Change, Any]]] = {}
    for path, weight in files:
        with reading(path):
            adapter = read_adapter(path)
            if not isinstance(adapter, LowRank):
                raise ValueError(f"{path}: this kind isn't merged; give it to sample")
            changes = adapter.changes(bundle)
            weights = weights_of(changes, weight, str(path))
        for full_path, change in changes.items():
            changes_of.setdefault(full_path, []).append((change, weights[full_path]))
    parts = dict(bundle.parts())
    merged: dict[str, dict[str, Tensor]] = {}
    for full_path, each in changes_of.items():
        path = full_path.removeprefix("conditioner/")
        name, _, ours = path.partition("/")
        tensor = parts[name].params[ours].changed(partial(_sum, changes=each), path)
        merged.setdefault(name, {})[ours] = tensor
    for name, params in merged.items():
        bundle = bundle.with_params(name, params)
    return bundle


def _sum(base: np.ndarray, changes: Sequence[tuple[Change, Any]]) -> Any:
    return base + sum(change.delta(base, weights) for change, weights in changes)
