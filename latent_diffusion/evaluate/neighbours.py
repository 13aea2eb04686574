"""Do samples lie among real features, and do they reach all of them?

Precision and recall (Kynkäänniemi et al., NeurIPS 2019): the share of one set inside the balls
that reach from each point of the other set to its k-th neighbour. Density and coverage (Naeem et
al., ICML 2020) count the balls, and ask whether each real ball holds a sample.

Distances are computed block by block, rows spread over all devices; memory is a block and O(N).
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.evaluate.measured import Measured, check_count
from latent_diffusion.runtime import parallel

ROWS = 1024  # a block, spread over the devices
COLUMNS = 8192


def _squared(x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared distances [N M]; as a sum of products, where the largest terms have been moved away.

    Both sets are centred by the caller, so that the cancellation is mild.
    """
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
    """In how many columns' balls every row lies."""
    inside = _squared(batch["x"], columns["y"]) <= columns["radius"]
    return jnp.sum(inside & columns["real"], 1)


def _blocks(rows: np.ndarray, size: int, centre: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of one size, centred; the last is filled up with zeros."""
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
    found = np.full((len(rows), k), np.inf, np.float32)
    for at, y in _blocks(columns, column_size, centre):
        real = np.arange(column_size) < at.stop - at.start
        constants = {"y": y, "real": real}
        for here, x in _blocks(rows, row_size, centre):
            mine = {"x": parallel.process_rows(x, "auto")}
            new = run({}, constants, mine, jax.random.key(0))[: here.stop - here.start]
            found[here] = np.sort(np.concatenate([found[here], new], 1), 1)[:, :k]
    return found


def balls_around(
    rows: np.ndarray, columns: np.ndarray, radius: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """For every row [N], in how many of the balls around the columns (squared radii [M]) it is."""
    run = parallel.compile_eval(_inside_step, "auto")
    row_size, column_size = _sizes(rows, columns)
    counts = np.zeros(len(rows), np.int64)
    for at, y in _blocks(columns, column_size, centre):
        held = at.stop - at.start
        constants = {
            "y": y,
            "real": np.arange(column_size) < held,
            "radius": np.pad(radius[at], (0, column_size - held)),
        }
        for here, x in _blocks(rows, row_size, centre):
            mine = {"x": parallel.process_rows(x, "auto")}
            new = run({}, constants, mine, jax.random.key(0))
            counts[here] += new[: here.stop - here.start]
    return counts


def _radii(features: np.ndarray, k: int, centre: np.ndarray) -> np.ndarray:
    """Squared distance to the k-th neighbour: the nearest of all is the point itself."""
    return nearest(features, features, k + 1, centre)[:, k]


def _share(hits: np.ndarray) -> Measured:
    """Mean; error: its standard error over the points, the balls taken as given."""
    return Measured(float(hits.mean()), float(hits.std() / np.sqrt(len(hits))), len(hits))


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
        "precision": _share(balls_around(features, reference, real, centre) > 0),
        "recall": _share(balls_around(reference, features, fake, centre) > 0),
    }


def measure_density_coverage(
    features: np.ndarray, reference: np.ndarray, k: int = 5
) -> dict[str, Measured]:
    """Density: real balls around a sample ÷ k. Coverage: real balls that hold a sample."""
    check_count("dc", min(len(features), len(reference)), k + 2)
    centre = _centre(reference)
    radius = _radii(reference, k, centre)
    closest = nearest(reference, features, 1, centre)[:, 0]
    return {
        "density": _share(balls_around(features, reference, radius, centre) / k),
        "coverage": _share(closest <= radius),
    }
