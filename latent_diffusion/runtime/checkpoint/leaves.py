"""The leaves of a state: their paths, their shapes, and PRNG keys as plain arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from latent_diffusion.trees import leaves_by_path, path_string
from latent_diffusion.types import PyTree


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def keys_to_data(tree: PyTree) -> tuple[dict[str, str], PyTree]:
    """Typed PRNG keys as uint32 arrays, and which of the paths they were, with their kind."""
    impls = {
        path: str(jax.random.key_impl(leaf))
        for path, leaf in leaves_by_path(tree).items()
        if is_key(leaf)
    }
    return impls, jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree
    )


def key_as_data(leaf: Any) -> Any:
    """The ShapeDtypeStruct of what is stored for `leaf`."""
    sharding = getattr(leaf, "sharding", None)
    shape = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(np.shape(shape), shape.dtype, sharding=sharding)


def difference(expected: PyTree, saved: PyTree, shown: int = 3) -> str | None:
    """One line about the paths in which two trees differ; None if they don't."""
    want = _shapes(jax.tree.map(key_as_data, expected))
    have = _shapes(saved)
    paths = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if not paths:
        return None
    lines = [f"{p}: expected {want.get(p, 'nothing')}, got {have.get(p, 'nothing')}" for p in paths]
    more = f"; and {len(paths) - shown} more" if len(paths) > shown else ""
    return "; ".join(lines[:shown]) + more


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in leaves_by_path(tree).items()}


def as_keys(tree: PyTree, impls: Mapping[str, str]) -> PyTree:
    """Undo `keys_to_data`."""

    def wrap(path: Any, leaf: Any) -> Any:
        impl = impls.get(path_string(path))
        return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)

    return jax.tree_util.tree_map_with_path(wrap, tree)
