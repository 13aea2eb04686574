"""Sharding rules, which map the paths of a state to the cuts of its arrays over a mesh."""

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion.core.trees import path_string
from latent_diffusion.core.types import PyTree, lookup

Rules = Sequence[Sequence[str]]  # (regex, layout) pairs
DEFAULT_RULES = ((".*", "replicate"),)


def _replicate(leaf: Any, mesh: Mesh) -> P:
    return P()


def _tensor(leaf: Any, mesh: Mesh, axis: int) -> P:
    """Cut `axis` over "tensor"; scalars with the same path (step counts) are replicated."""
    if not leaf.shape:
        return P()
    if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % mesh.shape["tensor"]:
        raise ValueError(
            f"axis {axis} of shape {leaf.shape} does not divide over {mesh.shape['tensor']} devices"
        )
    return _cut(leaf.ndim, axis % leaf.ndim, "tensor")


def _fsdp(leaf: Any, mesh: Mesh, min_mb: int | float = 4) -> P:
    """Cut the largest axis that divides over "fsdp", if the array has at least min_mb MiB."""
    divisible = [i for i, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
    if not divisible or num_bytes(leaf) < min_mb * 2**20:
        return P()
    return _cut(leaf.ndim, max(divisible, key=lambda i: leaf.shape[i]), "fsdp")


def _cut(ndim: int, axis: int, name: str) -> P:
    return P(*(name if i == axis else None for i in range(ndim)))


LAYOUTS = {"replicate": _replicate, "tensor": _tensor, "fsdp": _fsdp}


def _parse_layout(spec: str) -> Callable[[Any, Mesh], P]:
    """Read "replicate", "tensor(-1)" or "fsdp(min_mb=4)"."""
    try:
        node = ast.parse(spec, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func)
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"can't read sharding layout {spec!r}") from error
    layout = lookup(LAYOUTS, name, "sharding layout")

    def apply(leaf: Any, mesh: Mesh) -> P:
        try:
            return layout(leaf, mesh, *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"bad arguments in sharding layout {spec!r}: {error}") from error

    return apply


def infer_shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """A NamedSharding for every leaf of `tree` (arrays or ShapeDtypeStructs).

    rules: (regex, layout) pairs. The first rule whose regex occurs in the '/'-joined path applies.
    The paths of optimiser moments and averaged parameters end like the parameter's, so the same
    rule applies to them. Layouts: "replicate", "tensor(axis)", "fsdp(min_mb=4)". Without rules
    every leaf is replicated.

    Raises ValueError for a leaf that no rule matches, and for a rule that matches no leaf.
    """
    parsed = [(regex, spec, _parse_layout(spec)) for regex, spec in rules or DEFAULT_RULES]
    matched: set[str] = set()

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = path_string(path)
        hits = [rule for rule in parsed if re.search(rule[0], name)]
        matched.update(rule[0] for rule in hits)
        if not hits:
            raise ValueError(f"no sharding rule matches {name!r}; end with ('.*', 'replicate')")
        regex, layout, apply = hits[0]
        try:
            return NamedSharding(mesh, apply(leaf, mesh))
        except ValueError as error:
            raise ValueError(
                f"sharding rule ({regex!r}, {layout!r}) at {name!r}: {error}"
            ) from error

    shardings = jax.tree_util.tree_map_with_path(sharding, shapes_of(tree))
    for regex, layout, _ in parsed:
        if regex not in matched and jax.tree.leaves(tree):
            raise ValueError(f"sharding rule ({regex!r}, {layout!r}) matches nothing")
    return shardings


def describe(shardings: PyTree, tree: PyTree) -> str:
    """A table: path, shape, dtype, sharding and bytes per device; the last row is the sum."""
    rows = [("path", "shape", "dtype", "sharding", "bytes/device")]
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(tree))
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = f"{num_bytes(leaf, sharding):,}"
        spec = str(tuple(sharding.spec)) if getattr(sharding, "spec", None) else "replicate"
        shape = "×".join(map(str, leaf.shape)) or "scalar"
        rows.append((path_string(path), shape, str(leaf.dtype), spec, size))
    rows.append(("total", "", "", "", f"{num_bytes(tree, shardings):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i == 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def num_bytes(tree: PyTree, shardings: PyTree = None) -> int:
    """The number of bytes of a tree on a device, or without shardings, of the whole tree."""
    leaves = jax.tree.leaves(shapes_of(tree))
    wholes = [leaf.shape for leaf in leaves]
    if shardings is not None:
        where = jax.tree.leaves(shardings)
        wholes = [s.shard_shape(shape) for s, shape in zip(where, wholes, strict=True)]
    return sum(
        int(np.prod(shape)) * leaf.dtype.itemsize
        for shape, leaf in zip(wholes, leaves, strict=True)
    )


def shapes_of(tree: PyTree) -> PyTree:
    """ShapeDtypeStructs of a tree's leaves."""
    return jax.eval_shape(lambda same: same, tree)
