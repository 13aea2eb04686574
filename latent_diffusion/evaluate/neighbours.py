"""Precision, recall, density and coverage of samples, by distances of nearest neighbours.

Every point of a set has a ball that reaches to its k-th neighbour in the same set. Precision and
recall (Kynkäänniemi et al., NeurIPS 2019) are the shares of samples inside real balls, and of real
points inside the samples' balls. Density (Naeem et al., ICML 2020) counts the real balls around a
sample; coverage is the share of real balls that contain a sample. Errors are standard errors over
the points, for fixed balls.

Distances are computed block by block, with the rows distributed over all devices. The memory for N
points is O(N) plus a block.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.evaluate.measured import Measured, check_count, mean_of
from latent_diffusion.runtime import parallel

ROWS = 1024  # rows per block, over all devices
COLUMNS = 8192  # columns per block


def _squared(x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared distances [N M] as x² + y² − 2xy, which loses few digits on centred sets."""
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1) - 2 * product, 0.0)


def _nearest_step(
    state: Any, columns: Any, batch: Any, rng: Any, *, k: int, axis_name: Any = None
) -> jax.Array:
    """The k smallest squared distances of every row to the columns."""
    distances = jnp.where(columns["real"], _squared(batch["x"], columns["y"]), jnp.inf)
    return -jax.lax.top_k(-distances, k)[0]


def _inside_step(
    state: Any, columns: Any, batch: Any, rng: Any, *, axis_name: Any = None
) -> jax.Array:
    """For every row, the number of columns whose balls contain it."""
    inside = _squared(batch["x"], columns["y"]) <= columns["radius"]
    return jnp.sum(inside & columns["real"], 1)


def _blocks(rows: np.ndarray, size: int, centre: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of the same size, centred; the last is padded with zeros."""
    for start in range(0, len(rows), size):
        block = np.asarray(rows[start : start + size], np.float32) - centre
        filled = np.pad(block, ((0, size - len(block)), (0, 0)))
        yield slice(start, start + len(block)), filled


def _sizes(rows: np.ndarray, columns: np.ndarray) -> tuple[int, int]:
    devices = jax.device_count()
    per_call = min(ROWS, len(rows))
    return per_call + -per_call % devices, min(COLUMNS, len(columns))


def nearest(rows: np.ndarray, columns: np.ndarray, k: int, centre: np.ndarray) -> np.ndarray:
    """The k smallest squared distances [N k] from every row to the columns, ascending."""
    row_size, column_size = _sizes(rows, columns)
    step = functools.partial(_nearest_step, k=min(k, column_size))
    run = parallel.compile_eval(step, "auto")
    smallest = np.full((len(rows), k), np.inf, np.float32)
    for at, y in _blocks(columns, column_size, centre):
        real = np.arange(column_size) < at.stop - at.start
        constants = {"y": y, "real": real}
        for here, x in _blocks(rows, row_size, centre):
            local = {"x": parallel.process_rows(x, "auto")}
            new = run({}, constants, local, jax.random.key(0))[: here.stop - here.start]
            smallest[here] = np.sort(np.concatenate([smallest[here], new], 1), 1)[:, :k]
    return smallest


def balls_around(
    rows: np.ndarray, columns: np.ndarray, radius: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """For each row [N], the number of columns' balls, of squared radii [M], that contain it."""
    run = parallel.compile_eval(_inside_step, "auto")
    row_size, column_size = _sizes(rows, columns)
    counts = np.zeros(len(rows), np.int64)
    for at, y in _blocks(columns, column_size, centre):
        count = at.stop - at.start
        constants = {
            "y": y,
            "real": np.arange(column_size) < count,
            "radius": np.pad(radius[at], (0, column_size - count)),
        }
        for here, x in _blocks(rows, row_size, centre):
            local = {"x": parallel.process_rows(x, "auto")}
            new = run({}, constants, local, jax.random.key(0))
            counts[here] += new[: here.stop - here.start]
    return counts


def _radii(features: np.ndarray, k: int, centre: np.ndarray) -> np.ndarray:
    """Squared distances to the k-th neighbour, not counting the point itself."""
    return nearest(features, features, k + 1, centre)[:, k]


def _centre(reference: np.ndarray) -> np.ndarray:
    return np.asarray(reference[:COLUMNS], np.float64).mean(0).astype(np.float32)


def measure_precision_recall(
    features: np.ndarray, reference: np.ndarray, k: int = 3
) -> dict[str, Measured]:
    """Precision: samples inside the real balls. Recall: real points inside the samples' balls."""
    check_count("pr", min(len(features), len(reference)), k + 2)
    centre = _centre(reference)
    real, fake = _radii(reference, k, centre), _radii(features, k, centre)
    return {
        "precision": mean_of(balls_around(features, reference, real, centre) > 0),
        "recall": mean_of(balls_around(reference, features, fake, centre) > 0),
    }


def measure_density_coverage(
    features: np.ndarray, reference: np.ndarray, k: int = 5
) -> dict[str, Measured]:
    """Density: real balls around a sample ÷ k. Coverage: share of real balls with a sample."""
    check_count("dc", min(len(features), len(reference)), k + 2)
    centre = _centre(reference)
    radius = _radii(reference, k, centre)
    closest = nearest(reference, features, 1, centre)[:, 0]
    return {
        "density": mean_of(balls_around(features, reference, radius, centre) / k),
        "coverage": mean_of(closest <= radius),
    }
