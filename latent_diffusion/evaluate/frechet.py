"""Fréchet distance of two sets of features, each described by a Gaussian (Heusel et al. 2017).

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½

Over the features of `inception` it is called FID. All sums are in float64, on the host, and their
memory doesn't depend on the number of images.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion.evaluate.measured import Measured, check_count
from latent_diffusion.files.arrays import check_finite, open_npz

GROUPS = 10  # groups of the jackknife
MIN_IMAGES = 2 * GROUPS
BLOCK = 4096  # rows that are converted to float64 at once


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D D] of `count` rows (0 if a file doesn't have the count)."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray  # divided by count - 1, as np.cov


def gaussian(features: np.ndarray) -> Gaussian:
    """The Gaussian of features [N D], an array in memory or mapped from a file; block by block."""
    starts = range(0, len(features), BLOCK)
    return combined([_of_block(features[i : i + BLOCK]) for i in starts])


def grouped(features: np.ndarray, groups: int = GROUPS) -> list[Gaussian]:
    """The Gaussians of `groups` disjoint parts: every `groups`-th row."""
    return [gaussian(features[i::groups]) for i in range(groups)]


def combined(parts: Iterable[Gaussian]) -> Gaussian:
    """The Gaussian of the union of disjoint sets (Chan et al. 1983)."""
    total, *rest = parts
    count, mean = total.count, total.mean
    scatter = total.covariance * (count - 1)
    for part in rest:
        difference, both = part.mean - mean, count + part.count
        scatter = scatter + part.covariance * (part.count - 1)
        scatter += np.outer(difference, difference) * (count * part.count / both)
        mean = mean + difference * (part.count / both)
        count = both
    return Gaussian(count, mean, scatter / max(count - 1, 1))


def _of_block(rows: np.ndarray) -> Gaussian:
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(0)
    centred = rows - mean
    return Gaussian(len(rows), mean, centred.T @ centred / max(len(rows) - 1, 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared distance d² (see the module); 0 for equal Gaussians."""
    return _distance(a, b, _root(b.covariance))


def _distance(a: Gaussian, b: Gaussian, root_b: np.ndarray) -> float:
    """root_b: the square root of b's covariance, whose computation takes most of the time."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {a.mean.size} against {b.mean.size}")
    eigenvalues = np.linalg.eigvalsh(root_b @ a.covariance @ root_b)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


@np.errstate(over="ignore", invalid="ignore")  # the command says it where numbers are too large
def measure_frechet(features: np.ndarray, reference: Gaussian, name: str) -> Measured:
    """Fréchet distance of features [N D] to a reference.

    error: the jackknife's standard error over ten groups of the samples. The value for few samples
    is biased upwards (Chong & Forsyth 2020), which the error doesn't show: compare equal N.
    """
    check_count(name, len(features), MIN_IMAGES)
    parts = grouped(features)
    root = _root(reference.covariance)
    value = _distance(combined(parts), reference, root)
    leave_one_out = [
        _distance(combined(parts[:i] + parts[i + 1 :]), reference, root) for i in range(len(parts))
    ]
    spread = np.sum(np.square(np.array(leave_one_out) - np.mean(leave_one_out)))
    error = np.sqrt((len(parts) - 1) / len(parts) * spread)
    return Measured(value, float(error), len(features))


def save_statistics(path: str | Path, statistics: Gaussian) -> None:
    """Write `mu` and `sigma`, as pytorch-fid and ADM's evaluator read them, and the `count`."""
    np.savez(path, mu=statistics.mean, sigma=statistics.covariance, count=statistics.count)


def load_statistics(path: str | Path) -> Gaussian:
    """Read `mu` [D], `sigma` [D D] and perhaps `count` of an .npz file.

    Raises ValueError, which begins with the path, for a file without them, and for numbers that are
    no mean, covariance and count.
    """
    with open_npz(path) as file:
        if "mu" not in file or "sigma" not in file:
            raise ValueError("it holds no statistics: no mu and sigma")
        for name in ("mu", "sigma"):
            if file[name].dtype.kind not in "iuf":
                raise ValueError(f"{name} is {file[name].dtype}, expected real numbers")
        mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise ValueError(
                f"mu {mean.shape} and sigma {covariance.shape}, expected [D] and [D D]"
            )
        check_finite(path, {"mu": mean, "sigma": covariance})
        variances = np.diag(covariance)
        alike = np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-5 * variances.max())
        if not alike or variances.min() < 0:
            raise ValueError(
                "sigma is no covariance: it isn't symmetric, or has negative variances"
            )
        count = file["count"] if "count" in file else np.zeros((), int)
        if count.shape or count.dtype.kind not in "iu":
            raise ValueError(f"count is {count.dtype} {count.shape}, expected an integer")
        return Gaussian(int(count), mean, covariance)
