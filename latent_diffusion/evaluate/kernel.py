"""Kernel distance: the unbiased squared MMD under a cubic kernel (Bińkowski et al., ICLR 2018).

    k(x, y) = (x·y / D + 1)³

Over the features of `inception` it is called KID.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float
from latent_diffusion.evaluate.measured import Measured, check_count
from latent_diffusion.runtime import parallel

SUBSETS = 100
SUBSET_SIZE = 1000
MIN_IMAGES = 10


def kernel_distance(x: Float[Array, "N D"], y: Float[Array, "M D"]) -> Float[Array, ""]:
    """Unbiased estimate of MMD² between the distributions of two sets of features."""
    n, m = x.shape[0], y.shape[0]
    within_x = (_kernel(x, x).sum() - jnp.trace(_kernel(x, x))) / (n * (n - 1))
    within_y = (_kernel(y, y).sum() - jnp.trace(_kernel(y, y))) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel(x, y).mean()


def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return (product / x.shape[1] + 1) ** 3


def _step(state: Any, constants: Any, batch: Any, rng: Any, *, axis_name: Any = None) -> jax.Array:
    return jax.lax.map(lambda pair: kernel_distance(*pair), (batch["x"], batch["y"]))


def measure_kernel(
    features: np.ndarray,
    reference: np.ndarray,
    name: str,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> Measured:
    """Mean over random subsets of both sets; every device works on a subset at a time.

    error: the standard deviation over the subsets, as papers report it.
    """
    check_count(name, min(len(features), len(reference)), MIN_IMAGES)
    size = min(size, len(features), len(reference))
    rng = np.random.default_rng(seed)
    run = parallel.compile_eval(_step, "auto")
    per_call, values = jax.device_count(), []
    for _ in range(0, subsets, per_call):
        pairs = [
            [
                np.asarray(rows[np.sort(rng.choice(len(rows), size, replace=False))], np.float32)
                for rows in (features, reference)
            ]
            for _ in range(per_call)
        ]
        batch = {key: np.stack([pair[i] for pair in pairs]) for i, key in enumerate("xy")}
        batch = parallel.process_rows(batch, "auto")
        values.extend(run({}, {}, batch, jax.random.key(0)))
    distances = np.asarray(values[:subsets], np.float64)
    return Measured(float(distances.mean()), float(distances.std()), len(features))
