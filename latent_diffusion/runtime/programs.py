"""Compiled programs on disk, so that a second start of a command neither traces nor compiles.

JAX's cache of compiled programs finds a program by its operations, so that each process has to
trace it first, which takes seconds for a Stable Diffusion. A program here is found by all that its
operations depend on: this package's code, the versions, JAX's settings, the device, the types of
the arguments, and a description of the rest by its caller.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from latent_diffusion.core.types import PyTree

log = logging.getLogger(__name__)

KEPT = 64  # programs; when another one is written, the one that was used longest ago is removed
folder: Path | None = None  # None: programs are neither read nor written; see `startup`
_hits: list[str] = []  # of JAX's cache, in this process
jax.monitoring.register_event_listener(
    lambda event, **_: _hits.append(event) if event.endswith("/cache_hits") else None
)


def types_of(arguments: PyTree) -> tuple[Any, ...]:
    """What a program depends on of its arguments, beside their structure: hashable."""
    return tuple(jax.typeof(leaf) for leaf in jax.tree.leaves(arguments))


def find(function: Any, arguments: tuple[Any, ...], description: str) -> Callable[..., Any]:
    """The program of a jitted function: from the disk, or compiled now and written there.

    arguments: arrays on one device. description: text that differs wherever another program would
    be traced for arguments of these types. Where it has the address of an object, which says
    nothing to another process, and where programs aren't stored, the result is the function itself.
    """
    if folder is None or re.search(" at 0x[0-9a-f]+", description):
        return function
    structure = jax.tree.structure((arguments, {}))
    (device,) = jax.tree.leaves(arguments)[0].devices()
    facts = (description, structure, types_of(arguments), _surroundings(device))
    path = folder / hashlib.sha256(repr(facts).encode()).hexdigest()
    if path.exists():
        try:
            payload, outputs = pickle.loads(path.read_bytes())
            program = serialize_executable.deserialize_and_load(
                payload, structure, outputs, execution_devices=[device]
            )
            os.utime(path)
        except Exception as error:  # JAX and pickle raise many kinds for a damaged file
            log.debug("%s can't be read: %s", path, error)
        else:
            return program
    began, hits = time.monotonic(), len(_hits)
    program = function.lower(*arguments).compile()
    seconds, least = time.monotonic() - began, "jax_persistent_cache_min_compile_time_secs"
    # A CPU's program that JAX has read from its cache can't be serialised again.
    if seconds >= jax.config.values[least] and len(_hits) == hits:
        _write(path, program)
    return program


def _write(path: Path, program: Any) -> None:
    """Write a program if JAX can serialise it and the disk has room."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        payload, _, outputs = serialize_executable.serialize(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(pickle.dumps((payload, outputs)))
        unfinished.replace(path)
        stored = sorted(path.parent.glob("[0-9a-f]*"), key=lambda entry: entry.stat().st_mtime)
        for oldest in stored[:-KEPT]:
            oldest.unlink()
    except Exception as error:  # of JAX or of the disk; the program itself is fine
        log.debug("%s can't be written: %s", path, error)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _surroundings(device: Any) -> tuple[Any, ...]:
    """What a program depends on beside its function: code, versions, settings and the device."""
    flags = {name: x for name, x in os.environ.items() if "XLA" in name or name == "NPROC"}
    settings = {**jax.config.values, **flags, "cores": os.cpu_count()}
    versions = [sys.version, *map(version, ("jax", "jaxlib", "flax", "numpy"))]
    versions += [device.client.platform_version, device.device_kind]
    return _code(), _processor(), device.id, versions, sorted(map(repr, settings.items()))


@functools.cache
def _code() -> str:
    """A hash of this package."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()


@functools.cache
def _processor() -> str:
    """The processor's instructions, which the programs of a CPU use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
