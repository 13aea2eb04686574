"""Adapters that are given to a sampling call: read, found in the model, and placed once."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion.convert import read_adapter
from latent_diffusion.convert.adapters import Adapter, Change, weights_of
from latent_diffusion.convert.bundle import Bundle, with_denoiser
from latent_diffusion.generation import program


def load_adapter(path: str | os.PathLike) -> Adapter:
    """The adapter in a file, or in PEFT's folder: LoRA and its kinds (see docs/adapters.md).

    It is a pytree, for `Model.sample(adapters=[(adapter, weight)])`. Raises ValueError, in one line
    that begins with the path and names the kind and the tensor, for what can't be read.
    """
    adapter: Adapter = jax.tree.map(jnp.asarray, read_adapter(path))
    return adapter


def bound(
    model: Any, adapters: Sequence[Any], mode: str
) -> tuple[list[dict[str, Change]], list[Any]]:
    """What each adapter changes in the model, on the devices of a mode, and with which weights.

    adapters: pairs of an `Adapter` and its `Weight`. Raises ValueError for an adapter of another
    model, and for prefixes of weights without a module.
    """
    changes, weights = [], []
    for entry in adapters:
        if not (isinstance(entry, tuple | list) and len(entry) == 2):
            raise ValueError(f"adapters are pairs (adapter, weight), not {str(entry)[:80]}")
        adapter, weight = entry
        if not isinstance(adapter, Adapter):
            raise ValueError(f"adapters come from load_adapter, not {str(adapter)[:80]}")
        own = _changes(model, adapter)
        weights.append(weights_of(own, weight, adapter.path))
        changes.append(program.placed(adapter, own, mode))
    return changes, weights


def _changes(model: Any, adapter: Adapter) -> dict[str, Change]:
    """The adapter's changes; they stay with it for further calls with models of this shape."""
    denoiser = model.denoiser
    shapes = [leaf.shape for leaf in jax.tree.leaves(denoiser.params)]
    key = (denoiser.network, denoiser.conditioner, model.origin.get("linear_projections"), shapes)
    last, changes = vars(adapter).get("_changes", (None, {}))
    if key != last:
        changes = adapter.changes(with_denoiser(Bundle(notes=model.origin), denoiser, {}))
        vars(adapter)["_changes"] = (key, changes)
    return changes
