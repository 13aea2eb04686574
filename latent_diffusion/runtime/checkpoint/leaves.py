"""PRNG keys in a state: Orbax stores them as plain arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from latent_diffusion.core.trees import is_key, leaves_by_path, path_string
from latent_diffusion.core.types import PyTree


def keys_to_data(tree: PyTree) -> tuple[dict[str, str], PyTree]:
    """({path of a typed PRNG key: its generator}, the tree with uint32 arrays for the keys)."""
    impls = {
        path: str(jax.random.key_impl(leaf))
        for path, leaf in leaves_by_path(tree).items()
        if is_key(leaf)
    }
    return impls, jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree
    )


def key_as_data(leaf: Any) -> Any:
    """The ShapeDtypeStruct of the array that is stored for `leaf`."""
    sharding = getattr(leaf, "sharding", None)
    shape = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(np.shape(shape), shape.dtype, sharding=sharding)


def as_keys(tree: PyTree, impls: Mapping[str, str]) -> PyTree:
    """The inverse of `keys_to_data`."""

    def wrap(path: Any, leaf: Any) -> Any:
        impl = impls.get(path_string(path))
        return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)

    return jax.tree_util.tree_map_with_path(wrap, tree)
