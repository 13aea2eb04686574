"""Errors about checkpoints, with messages of one line."""

import logging
import os
import re
import sys
from typing import Any


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint can't be written or read; the message is one line."""


class ArchitectureMismatch(CheckpointError):
    """The checkpoint is intact, but its tree differs from that of the state."""


class WorkdirInUse(RuntimeError):
    """Another process holds the lock on this workdir."""


def reason(error: Exception) -> str:
    """The reason of an error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    # TensorStore's messages are pages of specs that end with the operating system's error.
    if match := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(match[1]))
    first = text.strip().partition("\n")[0] or type(error).__name__
    return first if len(first) <= 200 else first[:200] + "…"


def silence_orbax() -> None:
    """Hide Orbax's reports of failures, since this package raises or logs them.

    Otherwise five threads log a traceback each. After a failed read or write, TensorStore's other
    operations fail on Orbax's closed event loop, and Python reports each as unraisable.
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
