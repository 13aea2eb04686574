"""The best checkpoint of a run by a number of its evaluation, beside the newest checkpoints.

`best/` in a workdir can be used as a workdir: `sample.py --workdir=runs/x/best`. It has the
parameters, and in `best.json` their step and the number.
"""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax

from latent_diffusion.core.types import lookup
from latent_diffusion.runtime import processes, workdir
from latent_diffusion.runtime.checkpoint import Checkpointer

SIGNS = {"min": 1.0, "max": -1.0}
HIGHER_IS_BETTER = r"eval_(psnr|accuracy\w*)"  # of an evaluation's numbers; others are errors
RECORD = "best.json"
ENTRIES = ("metric", "value", "step")  # of best.json, and of the checkpoint's metadata


class Best:
    """Saves the parameters with the best value of `metric`; a context manager.

    metric: a name in the evaluation's log ("eval_loss", "eval_fd_alexnet"); "" saves nothing. mode:
    whether the lowest or the highest value is the best; "" decides it by the metric.
    best.json is written when its checkpoint is on disk: by `settle`, at the end of the run, or by
    the next start, which reads the values from the checkpoint.
    """

    def __init__(self, run: Path, metric: str, mode: str):
        usual = "max" if re.fullmatch(HIGHER_IS_BETTER, metric) else "min"
        self._sign = lookup(SIGNS, mode or usual, "checkpoint.best_mode")
        self._run, self._metric = run, metric
        self._directory = run / "best"
        self._record: dict[str, Any] = {}
        self._pending = False  # whether the record waits for its checkpoint
        self._checkpoints = None
        if metric:
            self._checkpoints = Checkpointer(self._directory / "checkpoints", keep=1)
            self._record = self._last()
            self._pending = bool(self._record)
            self.settle()

    def begin(self, step: int) -> None:
        """Forget the best of later steps, which the run takes anew; call it at its start."""
        if self._checkpoints is None or self._record.get("step", 0) <= step:
            return
        if jax.process_index() == 0:  # the checkpoint that it describes is removed
            (self._directory / RECORD).unlink(missing_ok=True)
        self._record, self._pending = {}, False
        self._checkpoints.drop_after(step)

    def offer(self, step: int, state: Any, values: dict[str, float]) -> bool:
        """Save the parameters of `state` if their value is the best so far; returns whether it is.

        Returns before they are on disk. Raises ValueError if the evaluation lacks the metric.
        """
        if self._checkpoints is None:
            return False
        value = float(lookup(values, self._metric, "checkpoint.best"))
        same_metric = self._record.get("metric") == self._metric
        if not math.isfinite(value):
            return False
        if same_metric and self._sign * value >= self._sign * self._record["value"]:
            return False
        if jax.process_index() == 0:  # this save removes the checkpoint that it describes
            (self._directory / RECORD).unlink(missing_ok=True)
        self._record = {"metric": self._metric, "value": value, "step": step}
        name = "params" if state.ema_params is None else "ema_params"
        self._checkpoints.save(step, {name: getattr(state, name)}, self._record)
        self._pending = True
        return True

    def settle(self) -> None:
        """Write best.json if its checkpoint is on disk; doesn't wait for it."""
        checkpoints = self._directory / "checkpoints"
        if not self._pending or not (checkpoints / str(self._record["step"])).exists():
            return
        self._pending = False
        if jax.process_index() != 0:
            return
        for path in workdir.frozen_files(self._run):
            link = self._directory / path.name
            if not link.is_symlink():  # a copy of the workdir may have files for links
                link.unlink(missing_ok=True)
                link.symlink_to(Path("..") / path.name)
        text = json.dumps(self._record, indent=2) + "\n"
        workdir.write_whole(self._directory / RECORD, text)

    def _last(self) -> dict[str, Any]:
        """The record of the checkpoint on disk, the same on all processes; {} if there is none.

        It is in best.json, unless the process was killed before it wrote the file. Then it is the
        checkpoint's metadata, whose metric may be older: a step is saved only once.
        """
        assert self._checkpoints is not None
        saved = self._checkpoints.metadata() or {}
        record = {name: saved[name] for name in ENTRIES if name in saved}
        with contextlib.suppress(OSError, ValueError):
            written = json.loads((self._directory / RECORD).read_text(encoding="utf-8"))
            record = written if written["step"] == saved.get("step") else record
        return json.loads(processes.from_first(json.dumps(record)))

    def __enter__(self) -> "Best":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._checkpoints is not None:
            self._checkpoints.__exit__(*raised)
            self.settle()
