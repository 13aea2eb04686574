"""Signals that end a run: noted at once, obeyed after the step at hand."""

import os
import signal
from typing import Any

import jax

from latent_diffusion.runtime import processes


class Interrupted(Exception):
    """A signal stopped the run, after its state was saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, saved")
        self.exit_code = 128 + signum


class Stop:
    """Notes the first SIGINT or SIGTERM, so that the loop can save; a second one acts at once.

    On several processes SIGTERM is left to JAX's runtime, which lets all stop after the same step.
    """

    def __enter__(self) -> "Stop":
        self._signum: int | None = None
        alone = jax.process_count() == 1
        handlers = (
            {signal.SIGINT: self._note, signal.SIGTERM: self._note}
            if alone
            else {signal.SIGINT: self._pass_on}
        )
        self._before = {signum: signal.signal(signum, f) for signum, f in handlers.items()}
        return self

    def after(self, step: int) -> int | None:
        """The signal that ends the run after this step, if any."""
        return signal.SIGTERM if processes.preempted(step) else self._signum

    def _note(self, signum: int, frame: Any) -> None:
        self._signum = signum
        self._restore()

    def _pass_on(self, signum: int, frame: Any) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
