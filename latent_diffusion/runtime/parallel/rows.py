"""Functions that each device applies to its rows of a batch."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType

from latent_diffusion.core.types import Array
from latent_diffusion.runtime.parallel.modes import BATCH_SPEC


def on_rows(
    function: Callable[..., Array], otherwise: Callable[..., Array]
) -> Callable[..., Array]:
    """A function of arrays [B …] that maps rows to rows, applied to each device's rows in a mesh.

    The compiler divides neither custom kernels nor loops over a batch among the devices of a mesh.
    Outside of a step for a mesh, the result is the function itself; where B doesn't divide over the
    devices it calls `otherwise`.
    """

    def call(*arrays: Array) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
            return function(*arrays)
        parts = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
        if any(len(x) % parts for x in arrays):
            return otherwise(*arrays)
        return jax.shard_map(function, in_specs=BATCH_SPEC, out_specs=BATCH_SPEC, check_vma=False)(
            *arrays
        )

    return call
