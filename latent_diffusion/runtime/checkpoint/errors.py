"""What can go wrong with checkpoints, said in one line."""

import logging
import os
import re
import sys
from typing import Any


class CheckpointError(RuntimeError):
    """A checkpoint can't be written or read; the message is one line."""


class ArchitectureMismatch(CheckpointError):
    """The checkpoint is intact, but holds another tree than the one asked for."""


class WorkdirInUse(RuntimeError):
    """Another process holds the lock on this workdir."""


def reason(error: Exception) -> str:
    """The gist of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    # TensorStore's messages are pages of specs; the operating system's word on it is at their end.
    if found := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(found[1]))
    first = text.strip().partition("\n")[0] or type(error).__name__
    return first if len(first) <= 200 else first[:200] + "…"


def silence_orbax() -> None:
    """Keep Orbax's noise about failures off the screen: what matters is raised or logged by us.

    Five threads log a traceback each; and after one failed read or write, TensorStore's others
    find Orbax's event loop closed, which Python reports one by one as unraisable.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") == "without_closed_loops":
        return

    def without_closed_loops(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            hook(args)

    sys.unraisablehook = without_closed_loops


def _not_from_orbax(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":  # tasks and futures "never retrieved"
        return not re.search(r"[/\\]orbax[/\\]|in OCDBT database", record.getMessage())
    return f"{os.sep}orbax{os.sep}" not in record.pathname
