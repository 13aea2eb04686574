"""The metrics by name, and the names of their results.

Results over the features of `inception` are called `fid`, `kid`, `precision` ...; the name of any
other net is appended: `fd_alexnet`, `kd_alexnet`, `precision_alexnet`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latent_diffusion.core.types import lookup
from latent_diffusion.evaluate.clip_score import measure_clip_score
from latent_diffusion.evaluate.frechet import MIN_IMAGES as FRECHET
from latent_diffusion.evaluate.frechet import Gaussian, gaussian, measure_frechet
from latent_diffusion.evaluate.inception_score import SPLITS, measure_inception_score
from latent_diffusion.evaluate.kernel import MIN_IMAGES as KERNEL
from latent_diffusion.evaluate.kernel import measure_kernel
from latent_diffusion.evaluate.measured import Measured, check_count
from latent_diffusion.evaluate.neighbours import measure_density_coverage, measure_precision_recall

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """The images that samples are compared with: features [N D], or a Gaussian from a file."""

    features: np.ndarray | None = None
    statistics: Gaussian | None = None

    def gaussian(self) -> Gaussian:
        """The Gaussian from a file, or that of the features."""
        return gaussian(self.points("fd")) if self.statistics is None else self.statistics

    def points(self, metric: str) -> np.ndarray:
        """The features; ValueError if there are only statistics."""
        if self.features is None:
            raise ValueError(
                f"{metric} needs reference images; an .npz of mu and sigma serves fid and fd only"
            )
        return self.features


# The last two arguments: the net's name, the seed of random parts of the pictures.
Metric = Callable[[Arrays, Reference, str, int], dict[str, Measured]]


def _named(name: str, net: str) -> str:
    usual = {"fd": "fid", "kd": "kid"}
    return usual.get(name, name) if net == "inception" else f"{name}_{net}"


def frechet_name(net: str) -> str:
    """The name of the Fréchet distance over the features of `net`."""
    return _named("fd", net)


def _frechet(arrays: Arrays, reference: Reference, net: str, _: int) -> dict[str, Measured]:
    name = frechet_name(net)
    return {name: measure_frechet(arrays["features"], reference.gaussian(), name)}


def _kernel(arrays: Arrays, reference: Reference, net: str, seed: int) -> dict[str, Measured]:
    name = _named("kd", net)
    points = reference.points(name)
    return {name: measure_kernel(arrays["features"], points, name, seed=seed)}


def _inception(arrays: Arrays, _: Reference, net: str, seed: int) -> dict[str, Measured]:
    return {"inception_score": measure_inception_score(arrays["logits"], seed=seed)}


def _of_points(measure: Callable[..., dict[str, Measured]], metric: str) -> Metric:
    def run(arrays: Arrays, reference: Reference, net: str, _: int) -> dict[str, Measured]:
        results = measure(arrays["features"], reference.points(metric))
        return {_named(name, net): value for name, value in results.items()}

    return run


METRICS: dict[str, Metric] = {
    "fid": _frechet,
    "kid": _kernel,
    "is": _inception,
    "fd": _frechet,
    "kd": _kernel,
    "pr": _of_points(measure_precision_recall, "pr"),
    "dc": _of_points(measure_density_coverage, "dc"),
    "clip": lambda arrays, *_: {
        "clip_score": measure_clip_score(arrays["clip"], arrays["captions"])
    },
}
MINIMUM = {"fid": FRECHET, "fd": FRECHET, "kid": KERNEL, "kd": KERNEL, "is": SPLITS}
MINIMUM |= {"pr": 5, "dc": 7, "clip": 2}  # pr and dc: a picture, its k neighbours, and one more
DEFAULT = ["fd", "pr"]
INCEPTION_ONLY = ("fid", "kid", "is")
WITHOUT_REFERENCE = ("is", "clip")
WITHOUT_FEATURES = ("clip",)


def check_metrics(metrics: list[str], net: str) -> None:
    """Raise ValueError for an unknown metric, and for a metric that needs other features."""
    for metric in metrics:
        lookup(METRICS, metric, "metric")
        if metric in INCEPTION_ONLY and net != "inception":
            other = {"fid": "; fd is the same distance", "kid": "; kd is the same distance"}
            raise ValueError(
                f"{metric} means Inception features, not {net!r}{other.get(metric, '')}"
            )


def check_counts(metrics: Sequence[str], count: int) -> None:
    """Raise ValueError for a metric that needs more than `count` images."""
    for metric in metrics:
        check_count(metric, count, MINIMUM[metric])


def score(
    metrics: list[str], arrays: Arrays, reference: Reference, net: str, seed: int = 0
) -> dict[str, Measured]:
    """All results of `metrics`. arrays: outputs of the feature net `net` for samples.

    seed: chooses the subsets of the kernel distance and the parts of the Inception score.
    """
    check_metrics(metrics, net)
    results: dict[str, Measured] = {}
    for metric in metrics:
        results |= METRICS[metric](arrays, reference, net, seed)
    return results
