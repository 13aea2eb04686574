"""The most memory that a start takes on a device, against the device's share of the state.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.start_memory CONFIG

Every array is cut over all devices by FSDP. The program that makes the state is compiled, and not
run. With --whole a run of latent denoising starts, in pixels, and once more from its parameters
(`init_from`), while a thread adds up the arrays that live on one device.
"""

import functools
import importlib
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.start import resolve, start

GIB = 2**30


def main(name: str, *options: str) -> None:
    """Print the memory that one config's start takes."""
    config = importlib.import_module(f"configs.{name}").get_config().copy_and_resolve_references()
    config.parallel.update({"mode": "mesh", "mesh": {"data": 1, "fsdp": -1, "tensor": 1}})
    config.parallel.rules = ((".*", "fsdp(min_mb=0)"),)
    if options == ("--whole",):
        config.autoencoder.regularization = "identity"
        config.data.image_size = 8
        _start_twice(config)
        return
    layout = {"mesh": parallel.make_mesh({"fsdp": -1}), "rules": config.parallel.rules}
    init = functools.partial(TASKS[config.task](config).init, batch_spec=batch_spec(config))
    rng = jax.random.key(0, impl="unsafe_rbg")
    state, constants = jax.eval_shape(init, rng)
    frozen = parallel.num_bytes(constants)
    share = parallel.num_bytes(state, parallel.state_shardings(state, "mesh", **layout))
    program = parallel.compile_init(init, rng, "mesh", **layout).lower(rng).compile()
    peak = program.memory_analysis().peak_memory_in_bytes - frozen
    print(f"state {parallel.num_bytes(state) / GIB:.3f} GiB, share of a device {share / GIB:.3f}")
    print(f"most at once {peak / GIB:.3f} GiB, {peak / share:.2f} of the share", end="; ")
    print(f"beside them frozen parts, {frozen / GIB:.3f} GiB")


def _start_twice(config: ConfigDict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        run = _watched("from noise", lambda: _start(config, first))
        with Checkpointer(first / "checkpoints") as checkpoints:
            checkpoints.save(1, run.state, {})
        del run
        config.init_from = str(first)
        _watched("init_from", lambda: _start(config, second))


def _start(config: ConfigDict, directory: Path) -> Any:
    with Checkpointer(directory / "checkpoints") as checkpoints:
        return start(resolve(config, directory), directory, checkpoints)


def _watched(what: str, call: Callable[[], Any]) -> Any:
    """The result of a start, whose memory is printed."""
    most, done = 0, threading.Event()
    before = _living()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, _living() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = call()
    finally:
        done.set()
        watcher.join()
    share = sum(_on_a_device(leaf) for leaf in jax.tree.leaves(run.state))
    print(
        f"{what}: {most / GIB:.4f} GiB, {most / share:.2f} of the state's share {share / GIB:.4f}"
    )
    return run


def _living() -> int:
    return sum(_on_a_device(array) for array in jax.live_arrays())


def _on_a_device(array: jax.Array) -> int:
    """Bytes that an array takes on the first device."""
    if jax.devices()[0] not in array.sharding.device_set:
        return 0
    return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize


if __name__ == "__main__":
    main(*sys.argv[1:])
