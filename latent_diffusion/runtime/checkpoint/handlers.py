"""Handlers by which Orbax writes trees: states, and leaf by leaf trees larger than memory."""

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from latent_diffusion.files.tensor import Tensor


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """The handler of states.

    By default Orbax has every device write a part of a replicated array. On a single host this
    saves no time, and slicing needs a compilation for every shape.
    """
    if jax.process_count() > 1:
        return ocp.PyTreeCheckpointHandler()
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, types.NumpyHandler()),
        *((kind, types.ScalarHandler()) for kind in (int, float, np.number)),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def grouped(leaves: Sequence[Any], limit: int) -> list[range]:
    """Ranges of neighbouring arrays of at most `limit` bytes together, or of a single array."""
    groups, start, total = [], 0, 0
    for i, leaf in enumerate(leaves):
        nbytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if total + nbytes > limit and i > start:
            groups.append(range(start, i))
            start, total = i, 0
        total += nbytes
    return [*groups, range(start, len(leaves))]


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """A handler of numpy arrays that reads and writes one array after the other.

    Orbax's handler reads all arrays before it writes the first one.
    """

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Start to write; the returned future is done when the last array is on disk."""
        args = args or [ocp.SaveArgs()] * len(values)
        write = super().serialize

        async def each() -> None:
            for value, info, arg in zip(values, infos, args, strict=True):
                for written in await write([np.asarray(value)], [info], [arg]):
                    written.result()

        thread = ThreadPoolExecutor(1)  # Orbax's event loop is busy with this call
        future = thread.submit(asyncio.run, each())
        thread.shutdown(wait=False)
        return [future]


def lazy_handler() -> ocp.PyTreeCheckpointHandler:
    """A handler of trees of `Tensor`, which writes a file for each leaf."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Tensor, LazyHandler(deepcopy_host_arrays=False))
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
