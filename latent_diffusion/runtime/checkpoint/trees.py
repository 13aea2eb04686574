"""Trees of constants: a safetensors file with JSON metadata and a hash."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from latent_diffusion.core.trees import is_key, leaves_by_path
from latent_diffusion.core.types import PyTree
from latent_diffusion.runtime.checkpoint.errors import CheckpointError, reason


def save_tree(
    path: str | os.PathLike, tree: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a tree of arrays to one safetensors file, with JSON metadata and its hash.

    The file appears under `path` when it is complete. Process 0 writes it; every process must have
    whole arrays. Raises CheckpointError where the file can't be written.
    """
    if jax.process_index() != 0:
        return
    flat = dict(_flat_arrays(tree))
    header = {"metadata": json.dumps(dict(metadata or {})), "tree_hash": tree_hash(tree)}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, partial, metadata=header)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"writing {path} failed: {reason(error)}") from error


def load_tree(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of `save_tree`: (nested dicts of numpy arrays, metadata).

    Tuples, lists and dataclasses become dicts by position or field. Raises CheckpointError for a
    file that is missing, damaged or from another program.
    """
    tree: dict[str, Any] = {}
    if Path(path).exists() and not Path(path).is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"can't read {path}: no regular file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                *parents, last = name.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"can't read {path}: {reason(error)}") from error
    if "tree_hash" not in header:
        raise CheckpointError(f"can't read {path}: not written by this program")
    if tree_hash(tree) != header["tree_hash"]:
        raise CheckpointError(f"can't read {path}: its contents don't match its hash")
    return tree, json.loads(header["metadata"])


def tree_hash(tree: PyTree) -> str:
    """SHA-256 of sorted paths, dtypes, shapes and bytes; types of containers don't matter."""
    digest = hashlib.sha256()
    for name, array in sorted(_flat_arrays(tree), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _flat_arrays(tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """('/'-joined path, contiguous numpy array) of every leaf; typed keys as their data."""
    for path, leaf in leaves_by_path(tree).items():
        data = jax.random.key_data(leaf) if is_key(leaf) else leaf
        # ascontiguousarray would turn a scalar into a vector.
        yield path, np.asarray(data, order="C")
