"""Fingerprints of arrays, which show whether a restored array equals the saved array.

The fingerprint of an array is Σ_i (2i + 1) · bits_i mod 2³² over its elements in C order. Sums of
integers don't depend on their order, so every device can add up its part, however an array is cut
over devices and processes. Odd factors are invertible mod 2³², so every change of a single element
changes the sum. Larger damage leaves the sum unchanged in one of four billion cases, by chance.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.core.types import PyTree
from latent_diffusion.runtime.checkpoint.errors import CheckpointError

CHUNK = 1 << 20  # elements that numpy sums at once


def fingerprints(tree: PyTree) -> dict[str, str]:
    """ "dtype[shape]:sum" of every array, by path. The tree must not have typed PRNG keys."""
    leaves = leaves_by_path(tree)
    # All sums are dispatched before the first result is needed.
    sums = {path: _sum(leaf) for path, leaf in leaves.items()}
    return {
        path: f"{_kind(leaves[path])}:{int(np.asarray(total)):08x}" for path, total in sums.items()
    }


def check_kinds(tree: PyTree, saved: Mapping[str, str], parts: Any) -> None:
    """Raise CheckpointError where the paths, shapes or dtypes of a tree differ from the saved ones.

    saved: fingerprints. parts: names of the top-level entries in `tree`; None is all.
    """
    want = {
        path: fingerprint.rpartition(":")[0]
        for path, fingerprint in saved.items()
        if parts is None or path.partition("/")[0] in parts
    }
    have = {path: _kind(leaf) for path, leaf in leaves_by_path(tree).items()}
    wrong = [path for path in sorted(have.keys() | want.keys()) if have.get(path) != want.get(path)]
    if wrong:
        raise CheckpointError(f"its description is damaged at {wrong[0]}")


def check_values(state: PyTree, saved: Mapping[str, str]) -> None:
    """Raise CheckpointError that names the first array with another fingerprint."""
    for path, value in fingerprints(state).items():
        kind, _, total = value.rpartition(":")
        saved_kind, _, saved_total = saved[path].rpartition(":")
        if kind == saved_kind and total != saved_total:  # kinds differ if arrays were converted
            raise CheckpointError(f"its contents are damaged at {path}")


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _sum(leaf: Any) -> Any:
    on_host = not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())
    )
    return _host_sum(np.asarray(leaf)) if on_host else _device_sum(leaf)


def _host_sum(array: np.ndarray) -> np.uint32:
    flat = np.ascontiguousarray(array).reshape(-1)
    width = min(flat.itemsize, 4)
    words = flat.view(f"u{width}")
    total = 0
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK].astype(np.uint32)
        odd = np.arange(start, start + part.size, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        total += int(np.sum(part * odd, dtype=np.uint64))
    return np.uint32(total % 2**32)


@jax.jit
def _device_sum(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"u{width}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (place * 2 + 1), dtype=jnp.uint32)
