"""A number with its uncertainty."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """value ± error, from `count` images. Each metric says what its error is."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.5g} ± {self.error:.2g} ({self.count} images)"


def check_count(metric: str, count: int, minimum: int) -> None:
    """Raise ValueError where a metric has too few images."""
    if count < minimum:
        raise ValueError(f"{metric} needs at least {minimum} images, got {count}")
