"""Trees larger than memory: arrays that are read when they are written, one after the other."""

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from latent_diffusion.files.tensor import Tensor


def grouped(leaves: Sequence[Any], limit: int) -> list[range]:
    """Places of neighbouring arrays that together take no more than `limit` bytes, or are alone."""
    groups, start, total = [], 0, 0
    for i, leaf in enumerate(leaves):
        nbytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if total + nbytes > limit and i > start:
            groups.append(range(start, i))
            start, total = i, 0
        total += nbytes
    return [*groups, range(start, len(leaves))]


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, which would read all of them before the first is on disk."""

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Begin to write; the returned future ends with the last array."""
        args = args or [ocp.SaveArgs()] * len(values)
        write = super().serialize

        async def each() -> None:
            for value, info, arg in zip(values, infos, args, strict=True):
                for written in await write([np.asarray(value)], [info], [arg]):
                    written.result()

        thread = ThreadPoolExecutor(1)  # Orbax's own loop is busy with this call
        future = thread.submit(asyncio.run, each())
        thread.shutdown(wait=False)
        return [future]


def lazy_handler() -> ocp.PyTreeCheckpointHandler:
    """A handler of trees of `Tensor`, a file each: joint ones are gathered in memory first."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Tensor, LazyHandler(deepcopy_host_arrays=False))
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
