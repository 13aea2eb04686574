"""The description of a run, which is not allocated."""

import json

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion.core.types import lookup
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.checkpoint import CheckpointError
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import settings
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.start import check_new, with_files


def dry_run(config: ConfigDict) -> str:
    """A text about a run: config, parameters, sharding, memory, FLOPs. Nothing is allocated.

    It is the config with the fields that files decide (`init_from`, the first stage, a teacher), if
    they can be read. The last lines say if they can't, and if the run can't start on these devices.
    """
    make_task = lookup(TASKS, config.task, "task")
    problems = []
    try:
        config = with_files(config)
    except (ValueError, OSError, CheckpointError) as error:
        problems.append(f"without the files that decide fields of the config: {error}")
    else:
        check_new(config)
    task = make_task(config)
    mode, mesh = parallel.devices(config.parallel)
    try:
        parallel.check_batch_size(config.batch_size, mode, mesh, config.grad_accumulation)
    except ValueError as error:
        problems.append(f"can't start here: {error}")
    batch, rng = batch_spec(config), jax.random.key(0)
    state, constants = jax.eval_shape(task.init, rng, batch)
    shardings = parallel.state_shardings(state, mode, mesh, config.parallel.rules)
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.flat(config).items()]
    if mesh:
        lines.append(parallel.describe(shardings.params, state.params))
    for name, tree in task.components(state, constants).items():
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
        lines.append(f"{name:24s}{count / 1e6:10.2f} M")
    used = parallel.num_bytes(state, shardings), parallel.num_bytes(constants)
    lines.append(
        f"mode {mode} on {jax.device_count()} devices, mesh {dict(mesh.shape) if mesh else '-'}"
    )
    lines.append(f"bytes a device: state {used[0]:,}, constants {used[1]:,}")
    flops = parallel.count_flops(task.train_step, state, constants, batch, rng)
    lines.append(
        f"{flops / 1e12:.4g} TFLOP a step, {flops / config.batch_size / 1e9:.4g} GFLOP an image"
    )
    return "\n".join([*lines, *problems])
