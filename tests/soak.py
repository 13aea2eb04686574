"""Kill a run twenty times; its final weights must be those of one that lived.

    make soak, or: python tests/soak.py [--kills=20] [--seed=0] [--minutes=15] [--processes=1]

Two kills in five come at a random moment of a start's life: imports, restore, compilation, steps,
saves. The others wait for what could go wrong: during the first save, during a later one, while the
last checkpoint is being read. Every kill is listed with the place where it hit. With two processes
one of them or both are killed; a survivor must end by itself, soon and with one line.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401 - eight devices, as for the tests
import jax
import numpy as np
from test_processes import end, free_port, start_run

from latent_diffusion.runtime import partners
from latent_diffusion.runtime.checkpoint import Checkpointer

MOMENTS = ("random", "restore", "save", "random", "restore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    num_steps = 10 * options.kills
    moments = itertools.chain(["first save"] * 2, itertools.cycle(MOMENTS))
    with tempfile.TemporaryDirectory() as folder:
        lived, killed = Path(folder) / "lived", Path(folder) / "killed"
        start = time.monotonic()
        finish(lived, num_steps, options.processes)
        life = time.monotonic() - start  # mostly start-up: a kill may hit any of it
        kills, same = 0, True
        while kills < options.kills and time.monotonic() - began < 60 * options.minutes:
            moment = next(moments)
            if moment == "restore" and not saved(killed):
                moment = "random"
            runs = launch(killed, num_steps, options.processes)
            if not wait_for(moment, runs[0], killed / "checkpoints", rng.uniform(0, life)):
                end(runs)  # they have reached the end: once more from the start
                same = same and equal(lived, killed, options.processes)
                shutil.rmtree(killed)
                continue
            victims = rng.choice([runs, *([run] for run in runs)])
            for run in victims:
                run.kill()
            errors = survive(runs, victims)
            kills += 1
            print(f"kill {kills:2d}: {moment:10s} {last_line(errors[0])}", flush=True)
        finish(killed, num_steps, options.processes)
        same = same and equal(lived, killed, options.processes)
    minutes = (time.monotonic() - began) / 60
    print(f"{kills} kills in {minutes:.1f} minutes, final weights {'equal' if same else 'DIFFER'}")
    sys.exit(0 if same and kills else 1)


def saved(workdir: Path) -> bool:
    """Whether a checkpoint is complete."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def wait_for(moment: str, process, checkpoints: Path, seconds: float) -> bool:
    """Until the moment has come; False where the process has ended before."""
    until, left = time.monotonic() + seconds, saves(checkpoints)
    reached = {
        "random": lambda: time.monotonic() > until,
        "first save": lambda: saves(checkpoints) - left,
        "save": lambda: saves(checkpoints) - left,
        "restore": lambda: reads(process.pid, checkpoints),
    }[moment]
    while process.poll() is None:
        if reached():
            return True
        time.sleep(0.001)
    return False


def saves(checkpoints: Path) -> set[int]:
    """The checkpoints that are being written, or were when a run was killed; as inodes."""
    found = set()
    for path in checkpoints.glob("*tmp*"):
        with contextlib.suppress(OSError):
            found.add(path.stat().st_ino)
    return found


def reads(pid: int, checkpoints: Path) -> bool:
    """Whether a process has a file of a complete checkpoint open."""
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if re.match(rf"{re.escape(str(checkpoints))}/\d+/", os.readlink(descriptor)):
                    return True
    return False


def launch(workdir: Path, num_steps: int, count: int) -> list:
    """The processes of one run, which share eight devices."""
    if count == 1:
        return [start_run(workdir, num_steps=num_steps)]
    cluster = {"coordinator": free_port(), "num_processes": count, "connect_timeout": 60}
    return [
        start_run(workdir, 8 // count, num_steps, process_id=i, **cluster) for i in range(count)
    ]


def survive(runs: list, victims: list) -> list[str]:
    """The standard errors of all; exits where a survivor hangs or has more to say than a line."""
    began = time.monotonic()
    errors = end(runs)
    for run, error in zip(runs, errors, strict=True):
        if run not in victims:
            seconds = time.monotonic() - began
            print(f"  the survivor ended after {seconds:.1f} s: {last_line(error)}", flush=True)
            if seconds > partners.TIMEOUT + 30 or "Traceback" in error:
                sys.exit(f"the survivor ended after {seconds:.1f} s:\n{error}")
    return errors


def finish(workdir: Path, num_steps: int, count: int) -> None:
    """Let a run reach its end."""
    runs = launch(workdir, num_steps, count)
    errors = end(runs)
    if any(run.returncode for run in runs):
        sys.exit("\n".join(errors))


def equal(lived: Path, killed: Path, count: int) -> bool:
    """Whether two runs ended with the same weights: of one process to the bit."""
    want, got = final(lived), final(killed)
    if count == 1:
        return all(np.array_equal(want[path], got[path], equal_nan=True) for path in want)
    return all(np.allclose(want[path], got[path], rtol=1e-4, atol=1e-6) for path in want)


def final(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore().state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def last_line(error: str) -> str:
    """What the run had said last."""
    lines = [line for line in error.splitlines() if line.strip()]
    return repr(lines[-1]) if lines else "nothing said"


if __name__ == "__main__":
    main()
