"""End a process of several soon, and with a message of one line, when another process has died.

JAX's runtime detects a death in three ways: a collective fails at once; a process that loses the
coordinator is aborted at once; and a process that misses another's heartbeats is aborted after
`TIMEOUT` seconds, whatever it is doing. The runtime's reports are pages long, so this module
suppresses them.
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

TIMEOUT = 60  # seconds without a heartbeat after which a process is taken for dead
MESSAGE = "error: another process of this run has ended or can't be reached; see its last words"
_SIGNS = re.compile(
    r"gloo \w+ failed|remote process exited|connection (closed|reset) by peer|socket closed"
    r"|unhealthy|polled an error|coordination service|distributed service detected"
    r"|retrieve preemption notice|barrier (failed|timed out)",
    re.IGNORECASE,
)
_mute = threading.Event()  # set by the first sign of a death in the output of JAX's runtime
_handler: Any = None  # a reference, since Python must not delete the function that C calls


def is_death(error: object) -> bool:
    """Whether an error, or its text, is a consequence of the end of another process."""
    return bool(_SIGNS.search(str(error)))


def watch() -> None:
    """Make this process end with one line when another one dies.

    Output of libraries to the standard error passes through a thread, which suppresses the
    runtime's reports of a death. An abort after such reports, and an exception that is due to a
    death, end the process with `MESSAGE`. Any other exception ends it right after its traceback,
    without the shutdown that would wait for the other processes.
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
    """Handle SIGABRT; C calls this in the thread that has aborted."""
    time.sleep(0.2)  # the thread of `_pass_on` may not have read the last lines yet
    if _mute.is_set():
        end()


def _end_by(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if is_death(error):
        end()
    sys.__excepthook__(kind, error, traceback)
    os._exit(1)


def end() -> None:
    """Print that another process has died, and end at once."""
    print(MESSAGE, file=sys.stderr, flush=True)
    os._exit(1)
