"""Kill a run twenty times; its final weights must be those of one that lived.

    make soak, or: python tests/soak.py [--kills=20] [--seed=0] [--minutes=15] [--processes=1]

Two kills in five come at a random moment of a start's life: imports, restore, compilation, steps,
saves. The others wait for what could go wrong: during the first save, during a later one, while the
last checkpoint is being read, between a step and its evaluation. Every kill is listed with the
place where it hit. With two processes one of them or both are killed; a survivor must end by
itself, soon and with one line.
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
import several
from test_processes import ELASTIC, deviation, end, free_port, logged, saved, start_run

from latent_diffusion.runtime import partners

MOMENTS = ("random", "restore", "save", "random", "evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    num_steps = 4 * options.kills
    moments = itertools.chain(["first save"] * 2, itertools.cycle(MOMENTS))
    with tempfile.TemporaryDirectory() as folder:
        lived, killed = Path(folder) / "lived", Path(folder) / "killed"
        start = time.monotonic()
        finish(lived, num_steps, options.processes)
        life = time.monotonic() - start  # mostly start-up: a kill may hit any of it
        kills, worst, waits = 0, 0.0, [0.0]
        while kills < options.kills and time.monotonic() - began < 60 * options.minutes:
            moment = next(moments)
            if moment == "restore" and not any((killed / "checkpoints").glob("[0-9]*")):
                moment = "random"
            runs = launch(killed, num_steps, options.processes)
            if not wait_for(moment, runs[0], killed, rng.uniform(0, life)):
                end(runs)  # they have reached the end: once more from the start
                worst = max(worst, difference(lived, killed))
                shutil.rmtree(killed)
                continue
            victims = rng.choice([runs, *([run] for run in runs)])
            for run in victims:
                run.kill()
            errors, seconds = survive(runs, victims)
            waits.append(seconds)
            kills += 1
            who = "both" if len(victims) == len(runs) > 1 else runs.index(victims[0])
            print(f"kill {kills:2d}: {moment:10s} {who} {last_line(errors[0])}", flush=True)
        finish(killed, num_steps, options.processes)
        worst = max(worst, difference(lived, killed))
    minutes = (time.monotonic() - began) / 60
    print(
        f"{kills} kills in {minutes:.1f} minutes; survivors ended after {max(waits):.1f} s at most"
    )
    print(f"final weights differ by {worst:.1e} of each array's largest value at most")
    sys.exit(0 if kills and worst <= (ELASTIC if options.processes > 1 else 0) else 1)


def wait_for(moment: str, process, workdir: Path, seconds: float) -> bool:
    """Until the moment has come; False where the process has ended before."""
    checkpoints = workdir / "checkpoints"
    until, left = time.monotonic() + seconds, saves(checkpoints)
    reached = {
        "random": lambda: time.monotonic() > until,
        "first save": lambda: saves(checkpoints) - left,
        "save": lambda: saves(checkpoints) - left,
        "restore": lambda: reads(process.pid, checkpoints),
        "evaluation": lambda: evaluates(workdir),
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


def evaluates(workdir: Path) -> bool:
    """Whether the last step that is logged is to be evaluated, and isn't yet."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        last = logged(workdir)[-1]
        return (
            last["step"] % several.FIELDS["log.eval_every_steps"] == 0 and "eval_loss" not in last
        )
    return False


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
    flags = {"config.checkpoint.every_steps": 4}
    if count == 1:
        return [start_run(workdir, num_steps=num_steps, **flags)]
    flags |= {"coordinator": free_port(), "num_processes": count, "connect_timeout": 120}
    return [start_run(workdir, 8 // count, num_steps, process_id=i, **flags) for i in range(count)]


def survive(runs: list, victims: list) -> tuple[list[str], float]:
    """The standard errors of all, and how long a survivor lived on; exits where that is too long.

    It exits as well where a survivor has more to say than a line.
    """
    began = time.monotonic()
    errors, longest = end(runs), 0.0
    for run, error in zip(runs, errors, strict=True):
        if run not in victims:
            longest = time.monotonic() - began
            print(f"  the survivor ended after {longest:.1f} s: {last_line(error)}", flush=True)
            if longest > partners.TIMEOUT + 30 or "Traceback" in error:
                sys.exit(f"the survivor ended after {longest:.1f} s:\n{error}")
    return errors, longest


def finish(workdir: Path, num_steps: int, count: int) -> None:
    """Let a run reach its end."""
    runs = launch(workdir, num_steps, count)
    errors = end(runs)
    if any(run.returncode for run in runs):
        sys.exit("\n".join(errors))


def difference(lived: Path, killed: Path) -> float:
    """The largest deviation of the final weights of two runs, as a part of each array's largest."""
    want, got = saved(lived), saved(killed)
    return max(deviation(want[path], got[path]) for path in want)


def last_line(error: str) -> str:
    """What the run had said last."""
    lines = [line for line in error.splitlines() if line.strip()]
    return repr(lines[-1]) if lines else "nothing said"


if __name__ == "__main__":
    main()
