"""Seconds and memory of a call: each side runs in a separate process, and the two take turns.

    python -m benchmarks.measure SIDE PIPE NAME FOLDER DEVICE QUICK PYTHON    # such a process

One process waits while the other works, so that the threads of one library don't disturb the
other's, and the peak memory of a process is that of its library.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # by --device, as JAX calls them


class Call(NamedTuple):
    """A call to time. run returns when all is done; flops: of one run, or None."""

    run: Callable[[], Any]
    flops: float | None = None


class Setting(NamedTuple):
    """The input of the processes, also as words of a command.

    folder: the one that `reference.write` filled. pytorch_python: the interpreter of PyTorch's
    side.
    """

    folder: Path
    device: str
    quick: bool
    pytorch_python: str = sys.executable

    @classmethod
    def read(cls, folder: str, device: str, quick: str, pytorch_python: str) -> "Setting":
        """A setting from its words."""
        return cls(Path(folder), device, quick == "True", pytorch_python)

    def command(self, module: str, side: str, *words: Any) -> list[str]:
        """The command that runs a module of the benchmark for a side, with this setting."""
        python = self.pytorch_python if side == "pytorch" else sys.executable
        return [python, "-m", module, side, *map(str, (*words, *self))]


class Worker:
    """One side's call in a separate process, compiled and warm."""

    def __init__(self, side: str, name: str, setting: Setting):
        self._pipe, other = multiprocessing.Pipe()
        command = setting.command("benchmarks.measure", side, other.fileno(), name)
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()])
        other.close()
        self.output, self.flops = self._pipe.recv()

    def seconds(self) -> float:
        """The seconds of one more run."""
        self._pipe.send("run")
        return self._pipe.recv()

    def close(self) -> float:
        """End the process; returns its peak memory in MB while it was timed."""
        self._pipe.send("end")
        peak = self._pipe.recv()
        self._process.wait()
        return peak


def in_own_process(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a process whose JAX starts on the CPU."""
    process = multiprocessing.get_context("spawn").Process(target=_on_cpu, args=(function, *args))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed")


def _on_cpu(function: Callable[..., None], *args: Any) -> None:
    os.environ.update(environment("cpu"))
    function(*args)


def compare(name: str, sides: tuple[str, ...], setting: Setting, budget: float) -> dict[str, Any]:
    """One row: medians of both sides' runs, which alternate until `budget` seconds are spent.

    There are at least three rounds, or one if the setting is quick.
    """
    workers = {side: Worker(side, name, setting) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    least, budget = (1, 0) if setting.quick else (3, budget)
    start = time.perf_counter()
    while len(seconds["ours"]) < least or time.perf_counter() - start < budget:
        for side, worker in workers.items():
            seconds[side].append(worker.seconds())
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    row = {"name": name, **ratios(medians), "rounds": len(seconds["ours"])}
    row |= {f"{side}_peak_mb": round(worker.close()) for side, worker in workers.items()}
    outputs = [worker.output for worker in workers.values()]
    if len(outputs) == 2 and isinstance(outputs[0], np.ndarray):
        row["difference"] = float(np.abs(outputs[0] - outputs[1]).max() / outputs[1].std())
    return row | {"gflop": (workers["ours"].flops or 0) / 1e9}


def ratios(seconds: dict[str, float]) -> dict[str, float | None]:
    """The columns that every row has."""
    ours, theirs = seconds["ours"], seconds.get("pytorch")
    return {
        "ours_seconds": ours,
        "pytorch_seconds": theirs,
        "ratio_to_pytorch": None if theirs is None else ours / theirs,
    }


def environment(device: str) -> dict[str, str]:
    """The variables that a process of either side sets before it imports its library."""
    # Two processes share an accelerator; by default JAX takes all of its memory.
    return {"JAX_PLATFORMS": PLATFORMS[device], "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def threads() -> int:
    """The number of cores that this process, and so both libraries, may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up(side: str, device: str) -> Any:
    """The module of a side, in the process of this side."""
    os.environ.update(environment(device))
    if side == "pytorch":
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        torch.set_num_threads(threads())
    else:
        from latent_diffusion.runtime.startup import quiet_and_cached

        quiet_and_cached()
    return importlib.import_module(f"benchmarks.{side}")


def _serve(pipe: Connection, side: str, name: str, setting: Setting) -> None:
    call = set_up(side, setting.device).CALLS[name](setting.folder, setting.quick)
    output = call.run()
    _forget_peak()
    pipe.send((output, call.flops))
    while pipe.recv() == "run":
        start = time.perf_counter()
        call.run()
        pipe.send(time.perf_counter() - start)
    pipe.send(_peak_memory(side, setting.device))


def _forget_peak() -> None:
    """Reset the peak memory of this process (Linux), since compiling is no part of a call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(side: str, device: str) -> float:
    """Peak memory of this process in MB: of the accelerator, or on a CPU of the host."""
    if device == "cpu":
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if side == "pytorch":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**20


if __name__ == "__main__":
    its_side, number, its_name, *its_setting = sys.argv[1:]
    _serve(Connection(int(number)), its_side, its_name, Setting.read(*its_setting))
