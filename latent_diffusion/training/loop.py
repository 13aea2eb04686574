"""The training loop, which joins tasks, data, devices, checkpoints and logs."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latent_diffusion.runtime import metrics, parallel, startup
from latent_diffusion.runtime.checkpoint import (
    Checkpointer,
    CheckpointError,
    WorkdirInUse,
    acquire_lock,
)
from latent_diffusion.training.averages import Snapshots
from latent_diffusion.training.best import Best
from latent_diffusion.training.start import Start, resolve, start
from latent_diffusion.training.stop import Interrupted, Stop

# Errors that a user can cause and fix: the commands print them as one line.
USER_ERRORS = (
    ValueError,
    ModuleNotFoundError,
    OSError,
    CheckpointError,
    WorkdirInUse,
    metrics.NonFiniteError,
)


def train(config: ConfigDict, directory: str | Path) -> Any:
    """Train to `config.num_steps` in a workdir, from its latest checkpoint if it has one.

    Returns the final state. Raises Interrupted after a signal, NonFiniteError on NaN, and the
    errors of `USER_ERRORS` for bad input.
    """
    if "://" in str(directory):
        raise ValueError(f"workdir={directory}: a workdir is a folder; mount the bucket as one")
    directory = Path(directory).expanduser().absolute()
    config = resolve(config, directory)
    with (
        acquire_lock(directory),
        Checkpointer(directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        Best(directory, config.checkpoint.best, config.checkpoint.best_mode) as best,
        Snapshots(directory, bool(config.optimizer.averages)) as snapshots,
    ):
        run = start(config, directory, checkpoints)
        best.begin(run.step)
        snapshots.begin(run.step)
        with (
            Stop() as stop,
            metrics.Writer(directory, step=run.step) as writer,
            metrics.Progress(config.num_steps, run.step) as progress,
        ):
            if run.step:
                progress.write(f"resuming from step {run.step} of {checkpoints.directory}")
            return _steps(config, run, checkpoints, best, snapshots, stop, writer, progress)


def _steps(
    config: ConfigDict,
    run: Start,
    checkpoints: Checkpointer,
    best: Best,
    snapshots: Snapshots,
    stop: Stop,
    writer: metrics.Writer,
    progress: metrics.Progress,
) -> Any:
    """The remaining steps; after each come the log, the checkpoint, the evaluation, the pictures.

    The device never waits for the host: while it takes a step, a thread fetches the next batch, and
    the host reads the metrics of the step before; it waits for those of the same step only before a
    checkpoint, an evaluation or pictures.
    """
    state, step, log = run.state, run.step, _Log(config, run.step, writer, progress)
    if step:  # an earlier run may have been stopped between saving this step and all else
        if _averages_due(config, step):
            snapshots.save(step, state, run.mode)
        _look_at(config, run, state, step, best, stop, writer)
    unseen: tuple[int, Any] | None = None
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(next, run.batches)
        while step < config.num_steps and not stop.signum:
            state, values = run.train_step(state, run.constants, coming.result(), run.rng)
            step += 1
            coming = ahead.submit(next, run.batches)
            values["finite"].copy_to_host_async()
            if unseen:
                log.look(*unseen, state.params)
            unseen = step, values
            best.settle()
            progress.update(step)
            ends = bool(stop.poll()) or step == config.num_steps
            saves = _due(step, config.checkpoint.every_steps) or ends
            averages = _averages_due(config, step)
            if saves or averages or any(_looks(config, step)):
                log.look(step, values, state.params, ends)
                unseen, began = None, time.perf_counter()
                if saves:
                    whole = parallel.to_global(state, run.mode)
                    checkpoints.save(step, whole, {"seed": config.seed})
                if averages:
                    snapshots.save(step, state, run.mode)
                _look_at(config, run, state, step, best, stop, writer)
                log.speed.skip(time.perf_counter() - began)
    if stop.signum:
        checkpoints.save(step, parallel.to_global(state, run.mode), {"seed": config.seed})
        checkpoints.wait()
        progress.write(str(Interrupted(stop.signum, step)))
        raise Interrupted(stop.signum, step)
    return state


class _Log:
    """The log of a run's steps. start: the number of steps before the first."""

    def __init__(
        self, config: ConfigDict, start: int, writer: metrics.Writer, progress: metrics.Progress
    ):
        self.config, self.start, self.writer, self.progress = config, start, writer, progress
        self.speed = metrics.Throughput()

    def look(self, step: int, values: Any, params: Any, ends: bool = False) -> None:
        """Wait for the metrics of a step, and log them if that is due.

        params: of this step, or of a later step. Raises NonFiniteError if a metric isn't finite.
        """
        metrics.check_finite(step, values, params)
        self.speed.add(self.config.batch_size)
        if step == self.start + 1:
            self.progress.write(f"first step after {startup.seconds_since_start():.1f} s")
        if not (_due(step, self.config.log.every_steps) or ends):
            return
        rate = self.speed.read()
        measured = {"peak_memory_gib": metrics.peak_memory()}
        measured |= {} if rate is None else {"images_per_second": rate}
        numbers = jax.device_get({k: v for k, v in values.items() if k != "finite"})
        self.writer.scalars(step, {**numbers, **measured})
        self.progress.report(step, {"loss": float(numbers["loss"]), "images/s": rate})


def _look_at(
    config: ConfigDict,
    run: Start,
    state: Any,
    step: int,
    best: Best,
    stop: Stop,
    writer: metrics.Writer,
) -> None:
    """Evaluate, then draw, if it is due at this step and not done yet; never after a signal."""
    evaluates, draws = _looks(config, step)
    if not (evaluates or draws):
        return
    done = writer.logged(step)
    measured = {name: value for name, value in done.items() if name.startswith("eval_")}
    # `checkpoint.best` may have named another metric when this step was evaluated.
    complete = measured and config.checkpoint.best in ("", *measured)
    if evaluates and not complete and not stop.signum:
        measured = run.evaluator.measure(state, run.rng, stop.poll) or {}
        writer.scalars(step, measured)
    if evaluates and measured:
        best.offer(step, parallel.to_global(state, run.mode), measured)
        stop.poll()
    if draws and not done.get("pictures") and not stop.signum:
        for name, grid in run.evaluator.draw(state, run.rng).items():
            writer.image(step, name, grid)
        stop.poll()


def _looks(config: ConfigDict, step: int) -> tuple[bool, bool]:
    """Whether an evaluation and pictures are due at a step."""
    last = step == config.num_steps
    evaluates = _due(step, config.log.eval_every_steps) or last
    draws = metrics.image_log_steps(step, config.log.images_every_steps) or last
    return evaluates, draws


def _averages_due(config: ConfigDict, step: int) -> bool:
    return _due(step, config.checkpoint.averages_every_steps) or step == config.num_steps


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
