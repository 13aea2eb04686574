"""The metrics over features by name, and what each result is called.

Over the features of `inception` the results are `fid`, `kid`, `precision` ...; over any other net
they bear its name: `fd_alexnet`, `kd_alexnet`, `precision_alexnet`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from latent_diffusion.evaluate.clip_score import measure_clip_score
from latent_diffusion.evaluate.frechet import Gaussian, gaussian, measure_frechet
from latent_diffusion.evaluate.inception_score import measure_inception_score
from latent_diffusion.evaluate.kernel import measure_kernel
from latent_diffusion.evaluate.measured import Measured
from latent_diffusion.evaluate.neighbours import measure_density_coverage, measure_precision_recall
from latent_diffusion.types import lookup

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """What samples are held against: features [N D], or only their Gaussian (from a file)."""

    features: np.ndarray | None = None
    statistics: Gaussian | None = None

    def gaussian(self) -> Gaussian:
        """The Gaussian, computed where it wasn't given."""
        if self.statistics is not None:
            return self.statistics
        return gaussian(self.points("fd"))

    def points(self, metric: str) -> np.ndarray:
        """The features themselves; ValueError where there are only statistics."""
        if self.features is None:
            raise ValueError(
                f"{metric} needs reference images; an .npz of mu and sigma serves fid and fd only"
            )
        return self.features


def _named(name: str, net: str) -> str:
    usual = {"fd": "fid", "kd": "kid"}
    return usual.get(name, name) if net == "inception" else f"{name}_{net}"


def frechet_name(net: str) -> str:
    """What the Fréchet distance over the features of `net` is called."""
    return _named("fd", net)


def _frechet(arrays: Arrays, reference: Reference, net: str) -> dict[str, Measured]:
    name = frechet_name(net)
    return {name: measure_frechet(arrays["features"], reference.gaussian(), name)}


def _kernel(arrays: Arrays, reference: Reference, net: str) -> dict[str, Measured]:
    name = _named("kd", net)
    return {name: measure_kernel(arrays["features"], reference.points(name), name)}


def _inception_score(arrays: Arrays, reference: Reference, net: str) -> dict[str, Measured]:
    return {"inception_score": measure_inception_score(arrays["logits"])}


def _precision_recall(arrays: Arrays, reference: Reference, net: str) -> dict[str, Measured]:
    found = measure_precision_recall(arrays["features"], reference.points("pr"))
    return {_named(name, net): value for name, value in found.items()}


def _density_coverage(arrays: Arrays, reference: Reference, net: str) -> dict[str, Measured]:
    found = measure_density_coverage(arrays["features"], reference.points("dc"))
    return {_named(name, net): value for name, value in found.items()}


def _clip(arrays: Arrays, reference: Reference, net: str) -> dict[str, Measured]:
    return {"clip_score": measure_clip_score(arrays["clip"], arrays["captions"])}


METRICS: dict[str, Callable[[Arrays, Reference, str], dict[str, Measured]]] = {
    "fid": _frechet,
    "kid": _kernel,
    "is": _inception_score,
    "fd": _frechet,
    "kd": _kernel,
    "pr": _precision_recall,
    "dc": _density_coverage,
    "clip": _clip,
}
INCEPTION_ONLY = ("fid", "kid", "is")
WITHOUT_REFERENCE = ("is", "clip")
WITHOUT_FEATURES = ("clip",)


def check_metrics(metrics: list[str], net: str) -> None:
    """Raise ValueError for an unknown metric, or one that these features don't define."""
    for metric in metrics:
        lookup(METRICS, metric, "metric")
        if metric in INCEPTION_ONLY and net != "inception":
            other = {"fid": "; fd is the same distance", "kid": "; kd is the same distance"}
            raise ValueError(
                f"{metric} means Inception features, not {net!r}{other.get(metric, '')}"
            )


def score(
    metrics: list[str], arrays: Arrays, reference: Reference, net: str
) -> dict[str, Measured]:
    """All results of `metrics` for the arrays that the feature net named `net` made of samples."""
    check_metrics(metrics, net)
    results: dict[str, Measured] = {}
    for metric in metrics:
        results |= METRICS[metric](arrays, reference, net)
    return results
