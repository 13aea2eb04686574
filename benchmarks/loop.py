"""Steps per second of the training loop beside a loop that waits, in turns; on CPU, steps of 5 ms.

    python -m benchmarks.loop [--steps=300]

The loop that waits does what ours did before: it fetches and places a batch, takes the step, and
reads every metric before the next one. Both have the same step, batches, and log.
"""

import itertools
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import default
from latent_diffusion import data
from latent_diffusion.runtime import metrics, parallel
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.training import loop
from latent_diffusion.training.averages import Snapshots
from latent_diffusion.training.best import Best
from latent_diffusion.training.start import Start
from latent_diffusion.training.stop import Stop

STEPS = flags.DEFINE_integer("steps", 300, "Of each turn.")
TURNS, BATCH, TARGET = 5, 8, 5e-3


@flax.struct.dataclass
class State:
    """What the step changes."""

    params: jax.Array


def make_step(products: int) -> Any:
    """A step of so many matrix products."""

    def step(state: Any, constants: Any, batch: Any, rng: Any, *, axis_name: Any = None) -> Any:
        x = jax.lax.fori_loop(0, products, lambda _, x: jnp.tanh(x @ state.params), state.params)
        values = {f"metric_{i}": x[i].mean() for i in range(8)}
        return State(state.params + 1e-9 * batch["image"].mean()), {"loss": x.mean(), **values}

    return parallel.compile_step(metrics.flagged(step), "single")


def batches_of(config: Any) -> Any:
    """Placed batches of pictures, made by threads."""
    images = np.random.default_rng(0).integers(0, 256, (512, 64, 64, 3), np.uint8)
    transform = data.make_transform(config.data, train=True, as_bytes=True)
    made = data.iterate(data.ArraySource({"image": images}), transform, batch_size=BATCH, seed=0)
    return (parallel.place_batch(batch, "single", None) for batch in made)


def fresh() -> Any:
    """A state on its device."""
    return parallel.place(State(np.eye(192, dtype=np.float32)), "single")


def calibrated() -> Any:
    """A step that takes 5 ms."""
    batch = next(batches_of(make_config()))
    for products in itertools.count(4, 4):
        step, state = make_step(products), fresh()
        took = []
        for _ in range(12):
            begin = time.perf_counter()
            state, values = step(state, None, batch, jax.random.key(0))
            jax.block_until_ready(values)
            took.append(time.perf_counter() - begin)
        if np.median(took) >= TARGET:
            return step, float(np.median(took))
    raise AssertionError


def make_config() -> Any:
    """Logged every 50 steps, saved and looked at only in the end."""
    config = default.get_config()
    config.update_from_flattened_dict(
        {"num_steps": STEPS.value, "batch_size": BATCH, "log.every_steps": 50}
        | {"log.images_every_steps": 0, "log.eval_every_steps": 0, "checkpoint.every_steps": 0}
    )
    config.data.update({"image_size": 64, "flip": True})
    return config


def waiting(config: Any, step: Any, times: list[float]) -> None:
    """The loop that waits."""
    state, batches = fresh(), batches_of(config)
    with tempfile.TemporaryDirectory() as folder, metrics.Writer(Path(folder)) as writer:
        for number in range(1, config.num_steps + 1):
            times.append(time.perf_counter())
            state, values = step(state, None, next(batches), jax.random.key(0))
            numbers = {name: np.asarray(value) for name, value in values.items()}
            metrics.check_finite(number, {k: v for k, v in numbers.items() if k != "finite"})
            if number % config.log.every_steps == 0:
                writer.scalars(number, numbers)


def ours(config: Any, step: Any, times: list[float]) -> None:
    """The package's."""

    def timed(state: Any, *given: Any) -> Any:
        times.append(time.perf_counter())
        return step(state, *given)

    evaluator: Any = SimpleNamespace(measure=lambda *_: {}, draw=lambda *_: {})
    rng = jax.random.key(0)
    run = Start(0, fresh(), None, rng, batches_of(config), timed, evaluator, "single")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            Checkpointer(folder / "checkpoints") as checkpoints,
            Best(folder, "", "min") as best,
            Snapshots(folder, False) as snapshots,
            Stop() as stop,
            metrics.Writer(folder) as writer,
            metrics.Progress(config.num_steps) as progress,
        ):
            loop._steps(config, run, checkpoints, best, snapshots, stop, writer, progress)


def main(argv: list[str]) -> None:
    """Measure in turns, print."""
    config, (step, took) = make_config(), calibrated()
    rates = []
    for _ in range(TURNS):
        turn = []
        for run in (waiting, ours):
            times: list[float] = []
            run(config, step, times)
            turn.append((len(times) - 21) / (times[-1] - times[20]))
        rates.append(turn)
    before, now = np.median(rates, 0)
    ratio = np.median([new / old for old, new in rates])
    print(
        f"a step of {1e3 * took:.1f} ms: {before:.0f} steps/s of the loop that waits, "
        f"{now:.0f} of ours; ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    app.run(main)
