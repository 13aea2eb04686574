"""Read and write the weights of latent diffusion models in the common file formats.

A reader turns a path into a `Bundle` (an architecture in our terms, with tensors not yet read), and
a writer turns a bundle into files; every reader works with every writer. "The original" is the
code of the paper (CompVis) and its successors, whose models are single files.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from latent_diffusion.convert.adapters import (
    read_adapter,
    with_lora,
    with_loras,
    write_diffusers_lora,
    write_kohya_lora,
    write_own,
)
from latent_diffusion.convert.bundle import Bundle, Part, as_params, as_part, bundle_of
from latent_diffusion.convert.compvis import read_compvis
from latent_diffusion.convert.compvis_writing import write_compvis
from latent_diffusion.convert.diffusers import is_diffusers, read_diffusers, write_diffusers
from latent_diffusion.convert.orbax import read_orbax, write_orbax
from latent_diffusion.convert.tokenizers import with_tokenizer
from latent_diffusion.core.types import lookup
from latent_diffusion.files.reading import reading
from latent_diffusion.nets.conditioners import CONDITIONERS
from latent_diffusion.runtime import workdir

__all__ = [
    "FORMATS",
    "Bundle",
    "Part",
    "as_params",
    "as_part",
    "bundle_of",
    "read",
    "read_adapter",
    "with_lora",
    "with_loras",
    "write",
]

FORMATS = {
    "diffusers": write_diffusers,
    "compvis": write_compvis,
    "orbax": write_orbax,
    "lora": write_diffusers_lora,  # the adaptation of a workdir, without its model
    "kohya": write_kohya_lora,
    "textual_inversion": write_own("diffusers"),  # the added word of a workdir, without its model
    "a1111": write_own("a1111"),
}


def read(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> Bundle:
    """Read the model in a workdir, in a folder of diffusers, or in a file of the original.

    config, ema, tokenizer: see `read_compvis`; only tokenizer is for folders, too. variant: "fp16"
    or "non_ema" files of a folder of diffusers. Raises a ValueError that begins with the path for
    any other path, for an argument that is for another kind of path, and for files that are damaged
    or not supported.
    """
    path = os.path.expanduser(path)
    with reading(path):
        return _read(Path(path), config, ema, variant, tokenizer)


def _read(
    path: Path,
    config: str | os.PathLike | None,
    ema: bool | None,
    variant: str | None,
    tokenizer: str | os.PathLike | None,
) -> Bundle:
    yaml, words = (
        None if file is None else Path(file).expanduser() for file in (config, tokenizer)
    )
    if path.is_file():
        _refuse(path, "folders of diffusers", variant=variant)
        return read_compvis(path, yaml, ema, words)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    if is_diffusers(path):
        _refuse(path, "single files", config=config, ema=ema)
        bundle = read_diffusers(path, variant)
    elif (path / workdir.CONFIG).exists():
        _refuse(path, "single files", config=config, ema=ema)
        _refuse(path, "folders of diffusers", variant=variant)
        bundle = read_orbax(path)
    else:
        raise ValueError(
            f"{path} is no model: a workdir has a {workdir.CONFIG}, a folder of diffusers a "
            "model_index.json or a config.json"
        )
    return bundle if words is None else with_tokenizer(bundle, words)


def _refuse(path: Path, kind: str, **arguments: Any) -> None:
    """Raise ValueError for an argument that has an effect on another kind of path alone."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{path}: {name}={value} is for {kind}")


def _defaults(conditioner: str) -> dict[str, Any]:
    """The fields of a conditioner that a run may leave out, with their defaults."""
    fields = lookup(CONDITIONERS, conditioner, "conditioner").__dataclass_fields__.items()
    return {name: field.default for name, field in fields if name not in ("parent", "name")}


def write(
    bundle: Bundle,
    path: str | os.PathLike,
    format: str,
    dtype: Any = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write a bundle in one of `FORMATS`.

    dtype: for floating-point parameters, which in a workdir are float32; None keeps their dtypes.
    progress: is called with the number of parameters in each tensor that is written. Raises
    ValueError where the format can't express the model, and for a workdir that would join other
    files; a folder that was absent or empty is then absent.
    """
    writer, path = lookup(FORMATS, format, "format"), Path(path).expanduser()
    if format == "orbax" and dtype is not None and jnp.dtype(dtype) != jnp.float32:
        raise ValueError(f"a workdir has float32 parameters: dtype={dtype} is for other formats")
    bundle = bundle if dtype is None else bundle.astype(jnp.dtype(dtype))
    if format != "orbax":  # the other writers read all fields
        for name, part in bundle.conditioners.items():
            fields = {**_defaults(name), **part.fields}
            bundle = bundle.with_part(name, replace(part, fields=fields))
    empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if format == "orbax" and not empty:  # its checkpoints would stay
        raise ValueError(f"{path} isn't empty: choose another folder, or remove it first")
    try:
        writer(bundle, path, progress)
    except BaseException:
        if empty and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        raise
