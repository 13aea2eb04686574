"""Kill a run twenty times at random moments; its final weights must be those of one that lived.

    make soak, or: python tests/soak.py [--kills=20] [--seed=0] [--minutes=15]

Moments are uniform over the life of a start: imports, restore, compilation, steps, saves. At the
end every kill is listed with where it hit.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401 - eight devices, as for the tests
import jax
import numpy as np
import test_processes as runs

from latent_diffusion.checkpoint import Checkpointer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    num_steps = 10 * options.kills
    with tempfile.TemporaryDirectory() as folder:
        lived, killed = Path(folder) / "lived", Path(folder) / "killed"
        start = time.monotonic()
        finish(lived, num_steps)
        life = time.monotonic() - start  # mostly start-up: a kill may hit any of it
        kills, same = 0, True
        while kills < options.kills and time.monotonic() - began < 60 * options.minutes:
            process = runs._start(killed, num_steps=num_steps)
            time.sleep(rng.uniform(0, life))
            if process.poll() is not None:  # it has reached the end: once more from the start
                same = same and final(lived) == final(killed)
                shutil.rmtree(killed)
                continue
            saving = [path.name for path in (killed / "checkpoints").glob("*tmp*")]
            process.kill()
            (error,) = runs._end([process])
            kills += 1
            where = f"after {last_line(error)!r}, saving {saving or 'nothing'}"
            print(f"kill {kills}: {where}", flush=True)
        finish(killed, num_steps)
        same = same and final(lived) == final(killed)
    minutes = (time.monotonic() - began) / 60
    print(f"{kills} kills in {minutes:.1f} minutes, final weights {'equal' if same else 'DIFFER'}")
    sys.exit(0 if same and kills else 1)


def finish(workdir: Path, num_steps: int) -> None:
    """Let a run reach its end."""
    process = runs._start(workdir, num_steps=num_steps)
    (error,) = runs._end([process])
    if process.returncode:
        sys.exit(error)


def final(workdir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, bit by bit."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore().state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def last_line(error: str) -> str:
    """What the run had said last."""
    lines = [line for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing said"


if __name__ == "__main__":
    main()
