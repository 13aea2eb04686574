"""The parallel mode and the mesh of a run, and a process's part of a batch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from latent_diffusion.core.types import PyTree, lookup

AXIS_NAME = "batch"
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = P(("data", "fsdp"))


def resolve_mode(mode: str, over: Sequence[Any] | None = None) -> str:
    """Return "single", "pmap" or "mesh"; "auto" means single on one device, pmap on several.

    over: devices, by default those of this run.
    """
    over = jax.devices() if over is None else over
    names = {"single": "single", "pmap": "pmap", "mesh": "mesh"}
    names["auto"] = "single" if len(over) == 1 else "pmap"
    resolved = lookup(names, mode, "parallel mode")
    num_processes = len({device.process_index for device in over})
    if resolved == "single" and num_processes > 1:
        raise ValueError(
            f"parallel mode 'single' can't span {num_processes} processes; use pmap or mesh"
        )
    return resolved


def resolve(mode: str, mesh: Mesh | None) -> tuple[str, Mesh | None]:
    """The mode, and the mesh for mode "mesh" (by default: all devices on "data")."""
    mode = resolve_mode(mode)
    return mode, (mesh or make_mesh()) if mode == "mesh" else None


def make_mesh(
    axis_sizes: Mapping[str, int] | None = None, over: Sequence[Any] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes.

    axis_sizes: sizes by axis name; missing axes have size 1, and one size may be -1, for the rest
    of the devices. None means {"data": -1}. over: devices, by default those of this run. They are
    sorted by process, so that a process loads neighbouring rows of a batch, and the parts of an
    array that is cut over "tensor" or "fsdp" lie on neighbouring devices.
    Raises ValueError where the product isn't the number of devices.
    """
    over = jax.devices() if over is None else over
    sizes = mesh_sizes(axis_sizes, len(over))
    per_process = set(Counter(device.process_index for device in over).values())
    if len(per_process) > 1:
        raise ValueError(
            f"a mesh needs equally many devices on all processes, not {sorted(per_process)}"
        )
    ordered = sorted(over, key=lambda device: (device.process_index, device.id))
    # With explicit axes, shardings would be part of the types of the model's arrays.
    auto = (AxisType.Auto,) * 3
    return Mesh(np.asarray(ordered).reshape(tuple(sizes.values())), MESH_AXES, axis_types=auto)


def mesh_sizes(axis_sizes: Mapping[str, int] | None, count: int) -> dict[str, int]:
    """The sizes of all axes of a mesh over `count` devices; see `make_mesh`."""
    asked = dict(axis_sizes) if axis_sizes else {"data": -1}
    for name in asked:
        lookup(dict.fromkeys(MESH_AXES), name, "mesh axis")
    sizes = {name: int(asked.get(name, 1)) for name in MESH_AXES}
    shown = " × ".join(f"{name} {size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: sizes must be positive, and at most one may be -1")
    product = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = count // product
        product *= sizes[free[0]]
    if product != count:
        raise ValueError(f"mesh {shown} needs {product or 'more'} devices, but there are {count}")
    return sizes


def devices(settings: Any, over: Sequence[Any] | None = None) -> tuple[str, Mesh | None]:
    """(mode, mesh) of a config with the fields `mode` and `mesh` (sizes, for mode "mesh" only)."""
    mode = resolve_mode(settings["mode"], over)
    return mode, make_mesh(dict(settings["mesh"]), over) if mode == "mesh" else None


def process_shard(
    mode: str, mesh: Mesh | None = None, process_index: int | None = None
) -> tuple[int, int]:
    """(index, count): a process loads block `index` of `count` equal blocks of a global batch.

    Processes that share a tensor axis load the same block, which has the rows of all of them.
    process_index: that of the process; None is this process.
    """
    mode, mesh = resolve(mode, mesh)
    process = jax.process_index() if process_index is None else process_index
    if mesh is None:
        return process, jax.process_count()
    num_local = mesh.size // len({device.process_index for device in mesh.devices.flat})
    # The least number of devices, in the mesh's order, with whole processes and whole rows.
    block = math.lcm(num_local, mesh.shape["tensor"])
    return process * num_local // block, mesh.size // block


def process_rows(batch: PyTree, mode: str, mesh: Mesh | None = None) -> PyTree:
    """The rows of this process in a global batch that all processes have."""
    index, count = process_shard(mode, mesh)
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], batch)


def num_parts(mode: str, mesh: Mesh | None = None, over: Sequence[Any] | None = None) -> int:
    """The number of parts into which the devices divide a global batch.

    over: devices for modes without a mesh, by default those of this run.
    """
    if mode == "mesh":
        mesh = mesh or make_mesh(over=over)
        return mesh.shape["data"] * mesh.shape["fsdp"]
    over = jax.devices() if over is None else over
    return 1 if resolve_mode(mode, over) == "single" else len(over)


def check_batch_size(
    batch_size: int,
    mode: str,
    mesh: Mesh | None = None,
    micro_batches: int = 1,
    over: Sequence[Any] | None = None,
) -> None:
    """Raise ValueError where a global batch doesn't divide over devices and micro-batches."""
    parts = num_parts(mode, mesh, over)
    if micro_batches < 1:
        raise ValueError(f"grad_accumulation={micro_batches} must be at least 1")
    if batch_size < 1 or batch_size % (parts * micro_batches):
        times = f" × {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(f"batch_size={batch_size} doesn't divide over {parts} devices{times}")
