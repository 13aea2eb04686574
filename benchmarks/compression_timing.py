"""The time of training and sampling of benchmarks/compression.py on a quiet machine."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.generation.model import Model
from latent_diffusion.runtime import metrics, parallel
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

BATCH_SIZE = 32  # of sampling
TIMED = (10, 20)  # numbers of DDIM steps that are timed; all others follow


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls after a first one, which compiles."""
    call()
    return float(np.median([seconds_of(call) for _ in range(repeats)]))


def seconds_of(call: Callable[[], Any]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(config: ConfigDict) -> dict[str, Any]:
    """Seconds of training and sampling, measured with random weights."""
    task = TASKS["denoising"](config)
    spec, rng = batch_spec(config), jax.random.key(0, impl="unsafe_rbg")
    state, constants = jax.jit(lambda rng: task.init(rng, spec))(rng)
    first_stage, unet = constants.first_stage, jax.tree.map(np.asarray, state.params["unet"])
    denoiser = task.denoiser.replace(params={"unet": unet})
    model = Model(first_stage, denoiser, image_size=config.data.image_size)
    key = jax.random.key(1)

    def sample(num_steps: int) -> Any:
        return lambda: model.sample(key, num_images=BATCH_SIZE, num_steps=num_steps)

    images = np.zeros((64, *spec["image"].shape[1:]), np.float32)
    return {
        "seconds_per_image": {
            str(n): median_seconds(sample(n), repeats=3) / BATCH_SIZE for n in TIMED
        },
        "seconds_per_step": median_seconds(training(config, task, state, constants), repeats=20),
        "latent": list(jax.eval_shape(first_stage.encode, {"image": images}).shape[1:]),
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(unet))),
    }


def training(config: ConfigDict, task: Any, state: Any, constants: Any) -> Callable[[], None]:
    """A function that takes the next training step as the loop does, on random moments."""
    mode, mesh = parallel.devices(config.parallel)
    images = np.zeros((64, *task.image_shape), np.float32)
    shape = jax.eval_shape(constants.first_stage.moments, images).shape
    source = data.ArraySource(
        {"moments": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    )
    transform = data.make_transform(config.data, train=True)
    batches = data.iterate(source, transform, batch_size=config.batch_size, seed=0)
    layout = {"mesh": mesh, "rules": config.parallel.rules}
    step = parallel.compile_step(task.train_step, mode, **layout)
    state, rng = parallel.place(state, mode, **layout), jax.random.key(0)

    def train() -> None:
        nonlocal state
        state, values = step(state, constants, next(batches), rng)
        metrics.check_finite(0, values)

    return train


def steps_in(minutes: float, seconds_per_step: float) -> int:
    """The number of training steps that fit, at least one."""
    return max(1, round(60 * minutes / seconds_per_step))


def seconds_per_image(timed: Mapping[str, Any], num_steps: int) -> float:
    """Seconds by a straight line: a constant for decoding, and equal ones for every DDIM step."""
    few, more = TIMED
    first, second = (timed["seconds_per_image"][str(n)] for n in TIMED)
    return first + (second - first) * (num_steps - few) / (more - few)
