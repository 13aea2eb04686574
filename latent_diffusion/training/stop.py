"""Signals that end a run, after its current step or batch."""

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
    """Notes the first SIGINT or SIGTERM, so that the loop can save; the next signal ends at once.

    On several processes JAX's runtime handles SIGTERM, so that all stop at the same `poll`.
    signum: the signal that ends the run; None until `poll` has seen it.
    """

    def __enter__(self) -> "Stop":
        self.signum: int | None = None
        self._noted: int | None = None
        self._polls = 0
        single = jax.process_count() == 1
        handlers = (
            {signal.SIGINT: self._note, signal.SIGTERM: self._note}
            if single
            else {signal.SIGINT: self._pass_on}
        )
        self._before = {signum: signal.signal(signum, f) for signum, f in handlers.items()}
        return self

    def poll(self) -> int | None:
        """Look for a signal: after every step, before every batch of an evaluation.

        All processes must call it equally often, since they agree on a signal by counting calls.
        """
        if self.signum is None:
            self._polls += 1
            self.signum = signal.SIGTERM if processes.preempted(self._polls) else self._noted
        return self.signum

    def _note(self, signum: int, frame: Any) -> None:
        self._noted = signum
        self._restore()

    def _pass_on(self, signum: int, frame: Any) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
