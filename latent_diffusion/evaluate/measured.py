"""A number with its uncertainty."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """value ± error, from `count` images. Every metric defines its error."""

    value: float
    error: float
    count: int


def mean_of(values: np.ndarray) -> Measured:
    """The mean of values [N], one per image; error: the standard error of the mean."""
    values = np.asarray(values, np.float64)
    return Measured(
        values.mean().item(), values.std(ddof=1).item() / len(values) ** 0.5, len(values)
    )


def check_count(metric: str, count: int, minimum: int) -> None:
    """Raise ValueError if a metric has too few images."""
    if count < minimum:
        raise ValueError(f"{metric} needs at least {minimum} images, got {count}")
