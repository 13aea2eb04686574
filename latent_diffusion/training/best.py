"""The best checkpoint of a run by one of its evaluated numbers, beside the newest ones.

`best/` in a workdir can be used like a workdir: `sample.py --workdir=runs/x/best`. It holds the
parameters alone, and `best.json` says which step they are of and how good they are.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax

from latent_diffusion.runtime import processes, workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.types import lookup

SIGNS = {"min": 1.0, "max": -1.0}
RECORD = "best.json"
ENTRIES = ("metric", "value", "step")  # of the record, which is also the checkpoint's metadata


class Best:
    """Keeps the parameters with the lowest (or highest) value of `metric`; a context manager.

    metric: a name that an evaluation logs ("eval_loss", "eval_fd_alexnet"); "" keeps nothing.
    The record is written when its checkpoint is on disk: by `settle`, at the end, or by the next
    start, which reads it from the checkpoint.
    """

    def __init__(self, run: Path, metric: str, mode: str):
        self._sign = lookup(SIGNS, mode, "checkpoint.best_mode")
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

    def offer(self, step: int, state: Any, values: dict[str, float]) -> bool:
        """Keep the parameters of `state` if their value is the best so far: whether it is.

        Returns before they are on disk. Raises ValueError where the evaluation has no such number.
        """
        if self._checkpoints is None:
            return False
        value = float(lookup(values, self._metric, "checkpoint.best"))
        same_metric = self._record.get("metric") == self._metric
        if not math.isfinite(value):
            return False
        if same_metric and self._sign * value >= self._sign * self._record["value"]:
            return False
        if jax.process_index() == 0:  # it speaks of a checkpoint that is removed by this save
            (self._directory / RECORD).unlink(missing_ok=True)
        self._record = {"metric": self._metric, "value": value, "step": step}
        name = "params" if state.ema_params is None else "ema_params"
        self._checkpoints.save(step, {name: getattr(state, name)}, self._record)
        self._pending = True
        return True

    def settle(self) -> None:
        """Write the record of a checkpoint that has come to be on disk; never waits."""
        if not self._pending or not self._saved(self._record["step"]):
            return
        self._pending = False
        if jax.process_index() != 0:
            return
        for path in workdir.frozen_files(self._run):
            link = self._directory / path.name
            if not link.is_symlink():
                link.symlink_to(Path("..") / path.name)
        text = json.dumps(self._record, indent=2) + "\n"
        workdir.write_whole(self._directory / RECORD, text)

    def _last(self) -> dict[str, Any]:
        """The record of the checkpoint on disk, the same on all processes; {} without any.

        The checkpoint's metadata serves where a kill came before the record. Otherwise the file is
        right: one step, which is saved once, can be the best by one metric and then by another.
        """
        assert self._checkpoints is not None
        saved = self._checkpoints.metadata() or {}
        record = {name: saved[name] for name in ENTRIES if name in saved}
        with contextlib.suppress(OSError, ValueError):
            written = json.loads((self._directory / RECORD).read_text(encoding="utf-8"))
            record = written if written["step"] == saved.get("step") else record
        return json.loads(processes.from_first(json.dumps(record)))

    def _saved(self, step: int) -> bool:
        return (self._directory / "checkpoints" / str(step)).exists()

    def __enter__(self) -> "Best":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._checkpoints is not None:
            self._checkpoints.__exit__(*raised)
            self.settle()
