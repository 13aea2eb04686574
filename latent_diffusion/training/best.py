"""The best checkpoint of a run by one of its evaluated numbers, beside the newest ones.

`best/` in a workdir can be used like a workdir: `sample.py --workdir=runs/x/best`.
"""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.types import lookup

SIGNS = {"min": 1.0, "max": -1.0}
RECORD = "best.json"


class Best:
    """Keeps the state with the lowest (or highest) value of `metric`; a context manager.

    metric: a name that an evaluation logs ("eval_loss", "eval_fd_alexnet"); "" keeps nothing.
    """

    def __init__(self, run: Path, metric: str, mode: str):
        self._sign = lookup(SIGNS, mode, "checkpoint.best_mode")
        self._run, self._metric = run, metric
        self._directory = run / "best"
        self._record: dict[str, Any] = {}
        self._checkpoints = None
        if metric:
            self._checkpoints = Checkpointer(self._directory / "checkpoints", keep=1)
            if (self._directory / RECORD).is_file():
                self._record = json.loads((self._directory / RECORD).read_text(encoding="utf-8"))

    def offer(self, step: int, state: Any, values: dict[str, float]) -> bool:
        """Keep `state` if its value is the best so far: whether it is.

        Raises ValueError where the evaluation has no such number.
        """
        if self._checkpoints is None:
            return False
        value = float(lookup(values, self._metric, "checkpoint.best"))
        known = self._record if self._record.get("metric") == self._metric else {}
        if not math.isfinite(value):
            return False
        if known and self._sign * value >= self._sign * known["value"]:
            return False
        record = {"metric": self._metric, "value": value, "step": step}
        self._checkpoints.save(step, state, record)
        self._checkpoints.wait()
        self._record = record
        if jax.process_index() == 0:
            self._describe()
        return True

    def _describe(self) -> None:
        for name in (workdir.CONFIG, workdir.TOKENIZER, workdir.FIRST_STAGE):
            link = self._directory / name
            if (self._run / name).exists() and not link.is_symlink():
                link.symlink_to(Path("..") / name)
        text = json.dumps(self._record, indent=2) + "\n"
        workdir.write_whole(self._directory / RECORD, text)

    def __enter__(self) -> "Best":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()
