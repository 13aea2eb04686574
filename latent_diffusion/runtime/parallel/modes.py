"""Which mode and mesh a run has, and which part of a batch is this process's."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from latent_diffusion.types import PyTree, lookup

AXIS_NAME = "batch"
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = P(("data", "fsdp"))


def resolve_mode(mode: str) -> str:
    """Return "single", "pmap" or "mesh"; "auto" means single on one device, pmap on several."""
    known = {"single": "single", "pmap": "pmap", "mesh": "mesh"}
    known["auto"] = "single" if jax.device_count() == 1 else "pmap"
    resolved = lookup(known, mode, "parallel mode")
    if resolved == "single" and jax.process_count() > 1:
        raise ValueError(
            f"parallel mode 'single' can't span {jax.process_count()} processes; use pmap or mesh"
        )
    return resolved


def resolve(mode: str, mesh: Mesh | None) -> tuple[str, Mesh | None]:
    """The mode, and the mesh in mode "mesh" (by default: all devices on "data")."""
    mode = resolve_mode(mode)
    return mode, (mesh or make_mesh()) if mode == "mesh" else None


def make_mesh(
    axis_sizes: Mapping[str, int] | None = None, over: Sequence[Any] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes.

    axis_sizes: sizes by axis name; axes left out have size 1, one may be -1 (whatever is left).
    None means {"data": -1}. over: other devices than those of this run.
    Raises ValueError where the product isn't the number of devices.
    """
    given = dict(axis_sizes) if axis_sizes else {"data": -1}
    for name in given:
        lookup(dict.fromkeys(MESH_AXES), name, "mesh axis")
    sizes = {name: int(given.get(name, 1)) for name in MESH_AXES}
    shown = " × ".join(f"{name} {size}" for name, size in sizes.items())
    count = jax.device_count() if over is None else len(over)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: sizes must be positive, and at most one may be -1")
    product = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = count // product
        product *= sizes[free[0]]
    if product != count:
        raise ValueError(f"mesh {shown} needs {product or 'more'} devices, but there are {count}")
    # jax.make_mesh follows the topology; its default axis type, Explicit, would put shardings
    # into the types of the model's arrays.
    auto = (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=auto, devices=over)


def devices(settings: Any) -> tuple[str, Mesh | None]:
    """(mode, mesh) from a config with the fields `mode` and `mesh` (sizes, used by "mesh" only)."""
    mode = resolve_mode(settings["mode"])
    return mode, make_mesh(dict(settings["mesh"])) if mode == "mesh" else None


def process_shard(mode: str, mesh: Mesh | None = None) -> tuple[int, int]:
    """(index, count): this process loads block `index` of `count` equal blocks of a global batch.

    Processes that share rows of the mesh (a tensor axis across hosts) get the same index.
    """
    mode, mesh = resolve(mode, mesh)
    if mesh is None:
        return jax.process_index(), jax.process_count()
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    mine = [
        i for i, row in enumerate(rows) if any(d.process_index == jax.process_index() for d in row)
    ]
    index, rest = divmod(mine[0], len(mine))
    if rest or len(rows) % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        raise ValueError(f"process {jax.process_index()} owns scattered rows {mine} of the mesh")
    return index, len(rows) // len(mine)


def process_rows(batch: PyTree, mode: str, mesh: Mesh | None = None) -> PyTree:
    """This process's block of a global batch that all processes hold."""
    index, count = process_shard(mode, mesh)
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], batch)


def num_parts(mode: str, mesh: Mesh | None = None) -> int:
    """Into how many parts the devices divide a global batch."""
    mode, mesh = resolve(mode, mesh)
    if mesh is not None:
        return mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if mode == "single" else jax.device_count()


def check_batch_size(
    batch_size: int, mode: str, mesh: Mesh | None = None, micro_batches: int = 1
) -> None:
    """Raise ValueError where a global batch doesn't divide over devices and micro-batches."""
    parts = num_parts(mode, mesh)
    if micro_batches < 1:
        raise ValueError(f"grad_accumulation={micro_batches} must be at least 1")
    if batch_size < 1 or batch_size % (parts * micro_batches):
        times = f" × {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(f"batch_size={batch_size} doesn't divide over {parts} devices{times}")
