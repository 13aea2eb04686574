"""Snapshots of a run's power-function averages, and averages of other widths made of them.

    python -m latent_diffusion.training.averages --workdir=RUN --width=0.1 --out=FOLDER

writes a workdir with only the parameters, for sampling and evaluation. The run needs
`optimizer.averages`; there are snapshots every `checkpoint.averages_every_steps` and of its end.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from latent_diffusion.convert.experiment import read_config
from latent_diffusion.core.types import Params
from latent_diffusion.optimisation.averages import averages_of, weights
from latent_diffusion.runtime import flags as shared_flags
from latent_diffusion.runtime import parallel, workdir
from latent_diffusion.runtime.checkpoint import Checkpointer, CheckpointError
from latent_diffusion.runtime.startup import quiet_and_cached

FOLDER = "averages"


class Snapshots:
    """Saves the averages in the optimiser's state, and keeps all of them; a context manager."""

    def __init__(self, run: Path, wanted: bool):
        self._checkpoints = Checkpointer(run / FOLDER, keep=None) if wanted else None

    def begin(self, step: int) -> None:
        """Forget snapshots of later steps, which the run takes anew; call it at its start."""
        if self._checkpoints is not None:
            self._checkpoints.drop_after(step)

    def save(self, step: int, state: Any, mode: str) -> None:
        """Save the averages of this step if the run has such snapshots."""
        if self._checkpoints is None:
            return
        averages = averages_of(state.opt_state)
        self._checkpoints.save(step, parallel.to_global(averages, mode), {"widths": [*averages]})

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._checkpoints is not None:
            self._checkpoints.__exit__(*raised)


def rebuild(run: Path, width: float, out: Path, step: int | None = None) -> None:
    """Write a workdir with the average of a width, at the step of a snapshot (None: the last).

    Raises ValueError and CheckpointError, in one line, if the run has no such snapshot, the width
    isn't possible, or `out` isn't empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; --out names a new folder")
    config = read_config(run)
    with Checkpointer(run / FOLDER, read_only=True) as snapshots:
        saved = snapshots.all_steps()
        step = saved[-1] if step is None and saved else step
        if step not in saved:
            names = ", ".join(map(str, saved)) or "none"
            raise ValueError(f"{run / FOLDER} has no snapshot of step {step}; known: {names}")
        steps = [at for at in saved if at <= step]
        params = _sum(snapshots, steps, step, width)
    out.mkdir(parents=True, exist_ok=True)
    for path in workdir.frozen_files(run):
        shutil.copy(path, out)
    without_ema = config.task == "autoencoding" and not config.ema_decay
    with Checkpointer(out / "checkpoints") as checkpoints:
        checkpoints.save(step, {"params" if without_ema else "ema_params": params})


def _sum(snapshots: Checkpointer, steps: list[int], step: int, width: float) -> Params:
    """The weighted sum of all snapshots; only one is in memory at a time."""
    widths = [float(name) for name in (snapshots.metadata() or {})["widths"]]
    pairs = [(saved, own_width) for saved in steps for own_width in widths]
    weight = dict(zip(pairs, weights(pairs, step, width), strict=True))
    total: Params | None = None
    for saved in steps:
        snapshot = snapshots.restore(step=saved)
        assert snapshot is not None
        for own_width in widths:
            w, averages = weight[saved, own_width], snapshot.state[str(own_width)]
            part = jax.tree.map(lambda x, w=w: np.float32(w) * x, averages)
            total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def main(argv: list[str]) -> None:
    """Rebuild an average."""
    quiet_and_cached()
    try:
        rebuild(Path(RUN.value), WIDTH.value, Path(OUT.value), STEP.value)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    RUN = flags.DEFINE_string("workdir", None, "A run with averages.", required=True)
    WIDTH = flags.DEFINE_float("width", None, "Relative to the step, e.g. 0.1.", required=True)
    STEP = flags.DEFINE_integer("step", None, "Step of a snapshot; default: the last.")
    OUT = flags.DEFINE_string("out", None, "A new folder.", required=True)
    shared_flags.run(main, config=False)
