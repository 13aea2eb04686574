"""Connect the processes (hosts) of a run, and let them agree.

All processes must call these functions in the same order, except `exit_with` and `preempted`.
"""

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from latent_diffusion.runtime import partners

# Variables with the number of processes on this host, of Open MPI and of Slurm ("1(x4)").
_LOCAL_PROCESSES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")


def connect(
    distributed: bool,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Join the processes of this run, if it has several; call it before any other use of JAX.

    distributed: recognise the cluster (TPU pods, GKE, Slurm, Open MPI). Elsewhere coordinator
    ("host:port" of process 0), num_processes and process_id are all needed.
    timeout: seconds to wait for the other processes; then this process ends with a message.
    Raises ValueError where the other processes can't be identified, or their numbers of devices
    differ. If another process dies later, this one ends with one line (see `partners`).
    """
    addresses = (coordinator, num_processes, process_id)
    if not distributed and all(value is None for value in addresses):
        return
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id={process_id} is not below {num_processes} processes")
        if not re.fullmatch(r".+:\d+", coordinator):  # JAX's runtime would abort the process
            raise ValueError(f"--coordinator={coordinator} must be HOST:PORT")
    elif any(value is not None for value in addresses):
        raise ValueError("--coordinator, --num_processes and --process_id go together")
    # The runtime's time-out aborts the process with a stack trace, so this one is shorter.
    watchdog = threading.Timer(timeout, _give_up, (f"at {coordinator or 'the cluster'}", timeout))
    watchdog.daemon = True
    watchdog.start()
    partners.watch()
    try:
        _join(coordinator, num_processes, process_id, timeout)
        _use_all_devices()
        counts = Counter(device.process_index for device in jax.devices())
    finally:
        watchdog.cancel()
    for process, count in counts.items():
        if count != counts[0]:
            raise ValueError(
                f"process {process} has another number of devices than process 0: "
                f"{count} instead of {counts[0]}"
            )


def _join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Initialise JAX's runtime of several processes; ValueError, in one line, if it can't."""
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=partners.TIMEOUT,
        )
    except ValueError as error:
        raise ValueError(
            "--distributed found no cluster (TPU pod, GKE, Slurm, Open MPI); "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    except RuntimeError as error:  # the port may be taken
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"can't join the processes of {coordinator or 'the cluster'}: {reason}"
        ) from error


def _use_all_devices() -> None:
    """Give a process that is alone on its host all GPUs; JAX assumes one process for each GPU."""
    counts = [os.environ.get(name) for name in _LOCAL_PROCESSES]
    on_host = next((count for count in counts if count is not None), "")
    if re.fullmatch(r"1(\(x\d+\))?", on_host) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def exit_with(message: str) -> NoReturn:
    """End with an error; one of several processes ends at once, so that no other waits for it."""
    if jax.distributed.is_initialized():
        message = partners.MESSAGE if partners.is_death(message) else message
        print(message, file=sys.stderr, flush=True)
        if jax.process_index() == 0:
            time.sleep(2)  # so that the others, which depend on it, can print messages, too
        os._exit(1)
    sys.exit(message)


def _give_up(where: str, timeout: int) -> None:
    print(f"error: not all processes joined {where} in {timeout} s", file=sys.stderr, flush=True)
    os._exit(1)


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process, so that all processes act alike."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def preempted(step: int) -> bool:
    """Whether to stop after `step`, because some process got SIGTERM; equal on all processes.

    This isn't a collective: call it after every step; the runtime chooses a step that all processes
    will reach.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def from_first(text: str) -> str:
    """The text of process 0."""
    if jax.process_count() == 1:
        return text
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    padded = text.encode()[:size].ljust(size)
    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))).decode()


def check_same(settings: Mapping[str, Any], what: str) -> None:
    """Raise ValueError on all processes where the `settings` of any differ from process 0's.

    settings: nested mappings of values that JSON can hold. what: a word for them, for messages.
    """
    if jax.process_count() == 1:
        return
    here = _flat(json.loads(json.dumps(settings, default=str)))
    first = json.loads(from_first(json.dumps(here)))
    other = sorted(key for key in here.keys() | first.keys() if here.get(key) != first.get(key))
    if not any_process(bool(other)):
        return
    if other:
        key = other[0]
        raise ValueError(
            f"process {jax.process_index()} has another {what} than process 0: "
            f"{key}={here.get(key)!r} instead of {first.get(key)!r}"
        )
    raise ValueError(f"the processes of this run don't have the same {what}; see their messages")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}
