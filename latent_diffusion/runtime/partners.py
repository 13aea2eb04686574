"""How a process of several ends when another one has died: soon, and with one line.

JAX's runtime notices a death in three ways: a collective fails at once; a process that loses the
coordinator is aborted at once; and one that misses another's heartbeats is aborted after
`TIMEOUT` seconds, wherever it is. Its reports are pages, so they are held back here.
"""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from typing import Any

TIMEOUT = 60  # seconds without a heartbeat after which a process counts as dead
MESSAGE = "error: another process of this run has ended or can't be reached; see its last words"
_SIGNS = re.compile(
    r"gloo \w+ failed|remote process exited|connection (closed|reset) by peer|socket closed"
    r"|unhealthy|polled an error|coordination service|distributed service detected"
    r"|retrieve preemption notice|barrier (failed|timed out)",
    re.IGNORECASE,
)
_mute = threading.Event()  # set by the first sign of a death in what JAX's runtime writes
_handler: Any = None  # what C calls must not be collected


def is_death(error: object) -> bool:
    """Whether an error, or its text, comes of the end of another process."""
    return bool(_SIGNS.search(str(error)))


def watch() -> None:
    """From now on this process ends with one line where another one dies.

    What libraries write to the standard error passes through a thread, which holds back the
    runtime's reports of a death; an abort that follows them, and an exception that comes of a
    death, end the process with `MESSAGE`. Any other exception ends it at once after its traceback,
    without the shutdown for which the others would have to be there.
    """
    global _handler
    reading, writing = os.pipe()
    stderr = os.dup(2)
    sys.stderr = os.fdopen(stderr, "w", buffering=1, closefd=False)
    os.dup2(writing, 2)
    threading.Thread(target=_pass_on, args=(reading, stderr), daemon=True).start()
    sys.excepthook = _end_by
    faulthandler.enable(stderr)
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _pass_on(reading: int, stderr: int) -> None:
    with os.fdopen(reading, errors="replace") as lines:
        for line in lines:
            if is_death(line):
                _mute.set()
            if not _mute.is_set():
                os.write(stderr, line.encode())


def _aborted(signum: int) -> None:
    """Called by C, on whichever thread has aborted."""
    time.sleep(0.2)  # the thread that passes on may not have read the last words yet
    if _mute.is_set():
        end()


def _end_by(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if is_death(error):
        end()
    sys.__excepthook__(kind, error, traceback)
    os._exit(1)


def end() -> None:
    """Say that another process has died, and end at once."""
    print(MESSAGE, file=sys.stderr, flush=True)
    os._exit(1)
