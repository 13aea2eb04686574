"""Put states and batches on the devices of a compiled step."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion.core.trees import is_key
from latent_diffusion.core.types import PyTree
from latent_diffusion.runtime.parallel.modes import (
    AXIS_NAME,
    BATCH_SPEC,
    num_parts,
    process_shard,
    resolve,
)
from latent_diffusion.runtime.parallel.rules import Rules, infer_shardings, shapes_of


@functools.cache
def _local_mesh() -> Mesh:
    """The mesh of pmap: the devices of this process, in order."""
    return Mesh(np.asarray(jax.local_devices()), (AXIS_NAME,))


def local_rows() -> Sharding:
    """The sharding of rows over the devices of this process."""
    return NamedSharding(_local_mesh(), P(AXIS_NAME))


def replicated(mode: str, mesh: Mesh | None) -> Sharding:
    """The sharding with a whole copy on every device of a compiled step."""
    if mode == "single":
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh or _local_mesh(), P())


def state_shardings(tree: PyTree, mode: str, mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """The sharding of every leaf of a compiled step's state. Rules are for mode "mesh" alone."""
    mode, mesh = resolve(mode, mesh)
    if mesh is not None:
        return infer_shardings(tree, mesh, rules)
    return jax.tree.map(lambda _: replicated(mode, mesh), tree)


def place(tree: PyTree, mode: str, mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """Put a fresh or restored state (or constants) on the devices of a compiled step.

    Python scalars become arrays, so that all steps get the same types. An array that occurs twice
    (at the start the averaged parameters are the parameters) is copied, so that both can be
    donated. The result may share memory with `tree`, and a step that donates its state deletes
    both: use only the result afterwards.
    """
    seen: set[int] = set()

    def unshared(leaf: Any) -> Any:
        twice = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.copy() if twice and isinstance(leaf, jax.Array) else leaf

    tree = jax.tree.map(_strong, jax.tree.map(unshared, tree))
    return jax.tree.map(put, tree, state_shardings(tree, mode, mesh, rules))


def abstract(tree: PyTree, mode: str, mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """ShapeDtypeStructs with shardings, for restoring a checkpoint; then `place` the result."""
    tree = shapes_of(tree)
    shardings = state_shardings(tree, mode, mesh, rules)
    if mode == "pmap" and jax.process_count() > 1:
        shardings = jax.tree.map(lambda _: _everywhere(), tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def place_batch(host_batch: PyTree, mode: str, mesh: Mesh | None = None) -> PyTree:
    """Put this process's part of a global batch (numpy, leading axis B) on its devices.

    Raises ValueError where B doesn't divide over the devices. Batches of JAX arrays stay as they
    are, so that a loader may place the next batch while a step runs.
    """
    mode, mesh = resolve(mode, mesh)
    leaves = jax.tree.leaves(host_batch)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return host_batch
    if mode == "single":
        return jax.device_put(host_batch, replicated(mode, mesh))
    index, count = process_shard(mode, mesh)
    parts = num_parts(mode, mesh) // count
    for leaf in leaves:
        if len(leaf) % parts:
            raise ValueError(f"a batch of {len(leaf)} examples doesn't divide over {parts} devices")
    if mesh is None:
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), host_batch)
        return jax.device_put(split, local_rows())
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def spread(x: np.ndarray) -> jax.Array:
        def rows(where: Any) -> np.ndarray:
            start, stop, _ = where[0].indices(count * len(x))
            return x[start - index * len(x) : stop - index * len(x)]

        return jax.make_array_from_callback((count * len(x), *x.shape[1:]), sharding, rows)

    return jax.tree.map(spread, host_batch)


def to_global(tree: PyTree, mode: str) -> PyTree:
    """View the state of pmap on several processes as a replicated global state, without a copy.

    pmap returns arrays that are local to a process; checkpoints need global arrays. `place` makes
    them local again.
    """
    if mode != "pmap" or jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: _relabel(leaf, _everywhere()), tree)


def _everywhere() -> Sharding:
    """The sharding with a copy on every device of all processes."""
    return NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS_NAME,)), P())


def _relabel(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    """The array with this process's buffers, under another replicated sharding."""
    if is_key(leaf):
        data = _relabel(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _strong(leaf: Any) -> Any:
    """The leaf as an array without weak type, for which steps would be compiled once more."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    return leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def put(leaf: Any, sharding: Sharding) -> jax.Array:
    """The leaf, an array or a value for numpy, as an array under a sharding."""
    # Steps return committed arrays; for uncommitted ones they would be compiled once more.
    if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == sharding:
        return leaf
    local = getattr(leaf, "is_fully_addressable", True)
    if sharding.is_fully_addressable and not local:
        return _relabel(leaf, sharding)
    if sharding.is_fully_addressable or not local:
        return jax.device_put(leaf, sharding)
    # device_put would first compare the values of all processes by a collective for every leaf.
    if is_key(leaf):
        data = put(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
