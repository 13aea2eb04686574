"""The training loop, which joins tasks, data, devices, checkpoints and logs."""

from pathlib import Path
from typing import Any

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

# The errors that a user can cause and mend: the commands print them as one line.
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
    directory = Path(directory).absolute()
    config = resolve(config, directory)
    with (
        acquire_lock(directory),
        Checkpointer(directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        Best(directory, config.checkpoint.best, config.checkpoint.best_mode) as best,
        Snapshots(directory, config.checkpoint.averages_every_steps) as snapshots,
    ):
        run = start(config, directory, checkpoints)
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
    """The steps that are left: each is logged, then saved, then evaluated, then drawn."""
    state, step, speed = run.state, run.step, metrics.Throughput()
    if step:  # an earlier run may have been stopped between this step and its evaluation
        _look_at(config, run, state, step, best, stop, writer)
    while step < config.num_steps and not stop.signum:
        state, values = run.train_step(state, run.constants, next(run.batches), run.rng)
        step += 1
        # Waiting for the values here costs little: the next batch is prefetched.
        metrics.check_finite(step, values, state.params)
        best.settle()
        speed.add(config.batch_size)
        progress.update(step)
        if step == run.step + 1:
            progress.write(f"first step after {startup.seconds_since_start():.1f} s")
        ends = stop.poll() or step == config.num_steps
        if _due(step, config.log.every_steps) or ends:
            rate = speed.read()
            measured = {"peak_memory_gib": metrics.peak_memory()}
            measured |= {} if rate is None else {"images_per_second": rate}
            writer.scalars(step, {**values, **measured})
            progress.report(step, {"loss": float(values["loss"]), "images/s": rate})
        if _due(step, config.checkpoint.every_steps) or ends:
            checkpoints.save(step, parallel.to_global(state, run.mode), {"seed": config.seed})
        snapshots.offer(step, state, run.mode, last=step == config.num_steps)
        if _look_at(config, run, state, step, best, stop, writer):
            speed.skip()
    if stop.signum:
        checkpoints.save(step, parallel.to_global(state, run.mode), {"seed": config.seed})
        checkpoints.wait()
        progress.write(str(Interrupted(stop.signum, step)))
        raise Interrupted(stop.signum, step)
    return state


def _look_at(
    config: ConfigDict,
    run: Start,
    state: Any,
    step: int,
    best: Best,
    stop: Stop,
    writer: metrics.Writer,
) -> bool:
    """Evaluate, then draw, where it is due at this step and not done yet; never after a signal.

    Returns whether anything was due.
    """
    last = step == config.num_steps
    evaluates = _due(step, config.log.eval_every_steps) or last
    draws = metrics.image_log_steps(step, config.log.images_every_steps) or last
    if not (evaluates or draws):
        return False
    done = writer.logged(step)
    measured = {name: value for name, value in done.items() if name.startswith("eval_")}
    # The metric of the best state may be another one than when this step was evaluated.
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
    return True


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
