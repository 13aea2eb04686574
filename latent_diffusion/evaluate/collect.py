"""Computes arrays from pictures, a chunk at a time, on all devices; it can be resumed.

The outputs of a step are written to memory-mapped `.npy` files after every chunk. So memory stays
constant, and an interrupted evaluation resumes with the next chunk. Process 0 writes; the other
processes have the same arrays in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_diffusion.evaluate.features import FeatureNet, levels_of
from latent_diffusion.runtime import parallel, processes

CHUNK = 512  # pictures between two records of progress; the noise of samples depends on it, too
PROGRESS = "progress.json"

Read = Callable[[int, int], np.ndarray]  # (start, stop) -> pictures
Report = Callable[[int], None]


def collect(
    step: Callable[..., Mapping[str, jax.Array]],
    constants: Any,
    read: Read,
    count: int,
    directory: Path,
    batch_size: int = 64,
    report: Report = lambda done: None,
) -> dict[str, np.ndarray]:
    """Run `step(state, constants, {"image": ...}, rng)` over `count` pictures: arrays [count ...].

    directory: folder of the arrays; another call with the same directory must be the same work (see
    `cache_folder`). All processes must share it, unless it is empty. The last batch is filled by
    repeated pictures, whose outputs are dropped. Every process reads all pictures, and its devices
    work on their share. Raises ValueError for outputs that aren't finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    batch_size = min(batch_size, CHUNK, count)
    batch_size += -batch_size % jax.device_count()
    run = parallel.compile_eval(step, "auto")
    done, arrays = _resume(directory)
    for start in range(done, count, CHUNK):
        stop = min(start + CHUNK, count)
        for name, value in _run_chunk(run, constants, read(start, stop), batch_size).items():
            finite = np.isfinite(value.reshape(len(value), -1)).all(1)
            if not finite.all():
                raise ValueError(
                    f"{name} of picture {start + finite.argmin()} has numbers that are not finite: "
                    "a network that computes them has wrong weights"
                )
            if name not in arrays:
                shape = (count, *value.shape[1:])
                arrays[name] = _new(directory / f"{name}.npy", value.dtype, shape)
            arrays[name][start:stop] = value
        if jax.process_index() == 0:
            for array in arrays.values():
                array.flush()
            (directory / PROGRESS).write_text(json.dumps({"done": stop, "arrays": sorted(arrays)}))
        report(stop)
    return dict(arrays)


def _new(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """An array on disk, or in memory on processes that don't write.

    Its place on the disk is taken now: a full disk, found by a write to mapped memory, would end
    the process without a message.
    """
    if jax.process_index() != 0:
        return np.empty(shape, dtype)
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _resume(directory: Path) -> tuple[int, dict[str, Any]]:
    """The number of finished pictures, and their arrays; the same on all processes."""
    mode: Any = "r+" if jax.process_index() == 0 else "c"  # "c": changes stay in memory
    try:
        text = (directory / PROGRESS).read_text() if jax.process_index() == 0 else "{}"
    except OSError:
        text = "{}"
    text, arrays = processes.from_first(text), {}
    try:
        progress = json.loads(text)
        for name in progress["arrays"]:
            arrays[name] = np.lib.format.open_memmap(directory / f"{name}.npy", mode)
    except (OSError, ValueError, KeyError):
        progress = {"done": 0}  # a new evaluation, or the process was killed while it wrote
    if processes.any_process(not progress["done"]):
        return 0, {}
    return progress["done"], arrays


def _run_chunk(
    run: Any, constants: Any, images: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    count = len(images)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = {"image": images[parallel.process_rows(index, "auto")]}
        for name, value in run({}, constants, batch, jax.random.key(0)).items():
            parts.setdefault(name, []).append(value)
    return {name: np.concatenate(values)[:count] for name, values in parts.items()}


def cache_folder(root: Path, work: Mapping[str, Any]) -> Path:
    """The folder under `root` for some work, as process 0 describes it; equal work has the same.

    work: everything on which the results depend. It is written into the folder.
    """
    text = processes.from_first(json.dumps(work, sort_keys=True, default=str))
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (folder / "work.json").write_text(text + "\n")
    return folder


def collect_features(
    read: Read,
    count: int,
    net: FeatureNet,
    directory: Path,
    batch_size: int = 64,
    report: Report = lambda done: None,
) -> dict[str, np.ndarray]:
    """The outputs of `net` for `count` pictures; read(start, stop) returns them as uint8."""

    def step(
        state: Any, params: Any, batch: Any, rng: Any, *, axis_name: str | None = None
    ) -> dict[str, jax.Array]:
        return net.apply(params, levels_of(batch["image"]))

    return collect(step, net.params, read, count, directory, batch_size, report)
