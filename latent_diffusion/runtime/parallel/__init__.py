"""One step function, three callers: the only place that says pmap, jit, Mesh or NamedSharding.

A step is `step(state, constants, batch, rng, *, axis_name=None) -> (state, metrics)`:

    single  `jax.jit` on one device
    pmap    every device runs the step on its part of the batch; the step averages over `axis_name`
    mesh    `jax.jit` over a (data, fsdp, tensor) mesh; arrays are global, rules over parameter
            paths say how the state is cut

The state has the same shapes in all three (no device axis), so checkpoints don't depend on them.

    modes      which mode, which mesh, which part of a batch is this process's
    rules      from paths of the state to how its arrays are cut
    placement  putting states and batches on their devices
    steps      compiling
    flops, hlo what a step computes, and what its compiled program sends
"""

from latent_diffusion.runtime.parallel.flops import count_flops
from latent_diffusion.runtime.parallel.modes import (
    AXIS_NAME,
    MESH_AXES,
    check_batch_size,
    devices,
    make_mesh,
    num_parts,
    process_rows,
    process_shard,
    resolve_mode,
)
from latent_diffusion.runtime.parallel.placement import (
    abstract,
    place,
    place_batch,
    put,
    state_shardings,
    to_global,
)
from latent_diffusion.runtime.parallel.rules import (
    Rules,
    describe,
    infer_shardings,
    num_bytes,
)
from latent_diffusion.runtime.parallel.steps import (
    CompiledStep,
    compile_eval,
    compile_init,
    compile_step,
    lower_for,
)

__all__ = [
    "AXIS_NAME",
    "MESH_AXES",
    "CompiledStep",
    "Rules",
    "abstract",
    "check_batch_size",
    "compile_eval",
    "compile_init",
    "compile_step",
    "count_flops",
    "describe",
    "devices",
    "infer_shardings",
    "lower_for",
    "make_mesh",
    "num_bytes",
    "num_parts",
    "place",
    "place_batch",
    "process_rows",
    "process_shard",
    "put",
    "resolve_mode",
    "state_shardings",
    "to_global",
]
