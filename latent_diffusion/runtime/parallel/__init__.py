"""Run a step on devices, in three modes. No other package uses pmap, Mesh or NamedSharding.

A step is `step(state, constants, batch, rng, *, axis_name=None) -> (state, metrics)`:

    single  `jax.jit` on one device
    pmap    every device runs the step on its part of the batch; the step averages over `axis_name`
    mesh    `jax.jit` over a (data, fsdp, tensor) mesh; arrays are global, and rules for parameter
            paths determine how the state is cut

The state has the same shapes in all modes (no device axis), so checkpoints don't depend on them.

    modes      the mode, the mesh, and the process's part of a batch
    rules      rules that map paths of the state to shardings
    placement  putting states and batches on their devices
    steps      compiling steps
    rows       functions that each device applies to its rows of a batch
    flops, hlo counting a step's operations, and the bytes that its compiled program sends
"""

from latent_diffusion.runtime.parallel.flops import count_flops
from latent_diffusion.runtime.parallel.initialisation import compile_init, initialise
from latent_diffusion.runtime.parallel.modes import (
    check_batch_size,
    devices,
    make_mesh,
    mesh_sizes,
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
from latent_diffusion.runtime.parallel.rows import on_rows
from latent_diffusion.runtime.parallel.rules import (
    describe,
    infer_shardings,
    num_bytes,
)
from latent_diffusion.runtime.parallel.steps import (
    compile_eval,
    compile_local,
    compile_part,
    compile_step,
    gathered,
    lower_for,
)
