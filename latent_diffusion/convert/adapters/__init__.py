"""Adapters: small changes of a model in files of their own, read, merged and written.

`names` knows the modules, `optimisation.deltas` the formulas, `adapter` joins them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.adapters.adapter import Adapter, Change, Weight, adapted, weights_of
from latent_diffusion.convert.adapters.reading import read_low_rank, read_weights
from latent_diffusion.convert.adapters.writing import write_diffusers_lora, write_kohya_lora
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.files.tensor import Tensor

__all__ = [
    "Adapter",
    "Change",
    "Weight",
    "adapted",
    "read_adapter",
    "read_weights",
    "weights_of",
    "with_lora",
    "write_diffusers_lora",
    "write_kohya_lora",
]


def read_adapter(path: str | os.PathLike) -> Adapter:
    """Read the adapter at `path`, of NumPy arrays. ValueError for kinds that aren't read."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return read_low_rank(path)


def with_lora(bundle: Bundle, path: Path, weight: Weight = 1.0) -> Bundle:
    """Return the model with `weight` times an adapter added to its parameters, when read."""
    changes = read_adapter(path).changes(bundle)
    weights = weights_of(changes, weight, str(path))
    for whole, change in changes.items():
        name, _, ours = whole.removeprefix("conditioner/").partition("/")
        base = dict(bundle.parts())[name].params[ours]
        bundle = bundle.with_params(name, {ours: _added(base, change, weights[whole])})
    return bundle


def _added(parameter: Tensor, change: Change, weights: Any) -> Tensor:
    def read() -> np.ndarray:
        base = np.asarray(parameter.read(), np.float32)
        added: np.ndarray = base + change.delta(base, weights)
        return added.astype(parameter.dtype)

    return Tensor(parameter.shape, parameter.dtype, read)
