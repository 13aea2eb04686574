"""The most memory that making a state takes on a device, against the device's share of the state.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.start_memory CONFIG

The parameters are cut over all devices by FSDP. The program is compiled, and not run.
"""

import functools
import importlib
import sys

import jax

from latent_diffusion.runtime import parallel
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

GIB = 2**30


def main(name: str) -> None:
    """Print the memory that one config's start takes."""
    config = importlib.import_module(f"configs.{name}").get_config().copy_and_resolve_references()
    layout = {"mesh": parallel.make_mesh({"fsdp": -1}), "rules": config.parallel.rules}
    init = functools.partial(TASKS[config.task](config).init, batch_spec=batch_spec(config))
    rng = jax.random.key(0, impl="unsafe_rbg")
    state, constants = jax.eval_shape(init, rng)
    frozen = parallel.num_bytes(constants)
    share = parallel.num_bytes(state, parallel.state_shardings(state, "mesh", **layout))
    program = parallel.compile_init(init, rng, "mesh", **layout).lower(rng).compile()
    peak = program.memory_analysis().peak_memory_in_bytes - frozen
    print(f"state {parallel.num_bytes(state) / GIB:.2f} GiB, share of a device {share / GIB:.3f}")
    print(f"most at once {peak / GIB:.3f} GiB, {peak / share:.2f} of the share", end="; ")
    print(f"beside them frozen parts, {frozen / GIB:.2f} GiB")


if __name__ == "__main__":
    main(sys.argv[1])
