"""How Orbax writes a state of arrays."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """What writes and reads states.

    By default every device writes a part of what all of them hold. On one host that gains nothing,
    and cutting costs a compilation for every shape.
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
