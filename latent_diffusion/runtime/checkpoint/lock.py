"""The lock of a workdir: only one run at a time trains there."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import Any

import jax

from latent_diffusion.runtime import processes
from latent_diffusion.runtime.checkpoint.errors import CheckpointError, WorkdirInUse, reason

log = logging.getLogger(__name__)


class WorkdirLock:
    """A lock, which is held from `acquire_lock` until `release` or the end of the process."""

    def __init__(self, file: Any = None):
        self._file = file

    def release(self) -> None:
        """Unlock the workdir for other runs."""
        if self._file is not None:
            self._file.truncate(0)  # an empty file means that no process holds the lock
            self._file.close()
            self._file = None

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire_lock(workdir: str | os.PathLike) -> WorkdirLock:
    """Lock `workdir` for this run; process 0 locks for all processes.

    On all processes, raises WorkdirInUse with the holder's pid, or CheckpointError where the lock
    can't be written.
    """
    lock, error = WorkdirLock(), None
    if jax.process_index() == 0 and "://" not in os.fspath(workdir):  # object stores have no locks
        try:
            lock = _lock(Path(workdir))
        except (WorkdirInUse, CheckpointError) as caught:
            error = caught
    if processes.any_process(error is not None):
        raise error or WorkdirInUse(f"process 0 can't lock {workdir}; see its message")
    return lock


def _lock(workdir: Path) -> WorkdirLock:
    path = workdir / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"can't write in {workdir}: {reason(error)}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise WorkdirInUse(f"workdir {workdir} is in use by {holder}; wait or stop it") from None
    except OSError as error:  # such as of Lustre, which has locks only if it is mounted so
        log.warning("%s can't be locked (%s): train no other run there", path, reason(error))
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return WorkdirLock(file)
