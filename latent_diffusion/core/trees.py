"""Leaves of trees by their paths: '/'-joined names, as in rules, messages and files."""

from typing import Any

import jax

from latent_diffusion.core.types import PyTree


def path_string(path: Any) -> str:
    """The '/'-joined form of a tree path, in which rules for paths search."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} of a tree, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): leaf for path, leaf in leaves}


def difference(expected: PyTree, got: PyTree, shown: int = 3) -> str | None:
    """A line that lists paths at which the shapes of two trees differ; None if they are equal."""
    want, have = (
        {path: tuple(leaf.shape) for path, leaf in leaves_by_path(tree).items()}
        for tree in (expected, got)
    )
    paths = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if not paths:
        return None
    lines = [f"{p}: expected {want.get(p, 'nothing')}, got {have.get(p, 'nothing')}" for p in paths]
    more = f"; and {len(paths) - shown} more" if len(paths) > shown else ""
    return "; ".join(lines[:shown]) + more


def check_same_tree(expected: PyTree, got: PyTree, source: str) -> None:
    """Raise a ValueError that names the first leaf with another shape. source: that of `got`."""
    if wrong := difference(expected, got, shown=1):
        raise ValueError(f"{source} holds another architecture: {wrong}")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
