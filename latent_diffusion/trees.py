"""Paths of trees: the '/'-joined names by which rules, messages and files call the leaves."""

from typing import Any

import jax

from latent_diffusion.types import PyTree


def path_string(path: Any) -> str:
    """The '/'-joined form of a tree path: the text that every rule over paths is searched in."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} of a tree, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): leaf for path, leaf in leaves}


def check_same_tree(expected: PyTree, got: PyTree, source: str) -> None:
    """Raise ValueError that names the first parameter whose shape differs. source: of `got`."""
    want, have = (
        {path: leaf.shape for path, leaf in leaves_by_path(tree).items()}
        for tree in (expected, got)
    )
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            raise ValueError(
                f"{source} holds another architecture: {path}: expected "
                f"{want.get(path, 'nothing')}, got {have.get(path, 'nothing')}"
            )
