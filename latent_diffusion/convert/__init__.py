"""Checkpoints that travel: everybody's latent diffusion weights, read and written.

Readers turn a path into a `Bundle` (architecture in our words, tensors still unread), writers turn
a bundle into files: any of the one with any of the other.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from latent_diffusion.convert.bundle import Bundle, Part, as_params, as_part, bundle_of
from latent_diffusion.convert.compvis import read_compvis, write_compvis
from latent_diffusion.convert.diffusers import is_diffusers, read_diffusers, write_diffusers
from latent_diffusion.convert.lora import with_lora, write_diffusers_lora, write_kohya_lora
from latent_diffusion.convert.orbax import read_orbax, write_orbax
from latent_diffusion.runtime import workdir
from latent_diffusion.types import lookup

__all__ = [
    "FORMATS",
    "Bundle",
    "Part",
    "as_params",
    "as_part",
    "bundle_of",
    "read",
    "with_lora",
    "write",
]

FORMATS = {
    "diffusers": write_diffusers,
    "compvis": write_compvis,
    "orbax": write_orbax,
    "lora": write_diffusers_lora,  # the adaptation of a workdir alone
    "kohya": write_kohya_lora,
}


def read(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> Bundle:
    """Read a workdir, a folder of diffusers, or a file of the original.

    config, ema, tokenizer: see `read_compvis`. variant: "fp16" or "non_ema" files of a folder.
    Raises ValueError where it is none of them, or isn't what it claims to be.
    """
    path = Path(path)
    if path.is_file():
        own = (None if given is None else Path(given) for given in (config, tokenizer))
        return read_compvis(path, next(own), ema, next(own))
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    if is_diffusers(path):
        return read_diffusers(path, variant)
    if (path / workdir.CONFIG).exists():
        return read_orbax(path)
    raise ValueError(
        f"{path} is no model: a workdir has a {workdir.CONFIG}, a folder of diffusers a "
        "model_index.json or a config.json"
    )


def write(
    bundle: Bundle,
    path: str | os.PathLike,
    format: str,
    dtype: Any = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write a bundle in one of `FORMATS`; dtype: of its floating-point parameters, if to change.

    progress: told the numbers of parameters as they are written.
    """
    writer = lookup(FORMATS, format, "format")
    bundle = bundle if dtype is None else bundle.astype(jnp.dtype(dtype))
    writer(bundle, Path(path), progress)
