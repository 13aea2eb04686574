"""Guides that steer a trained model while it samples: a classifier, or a picture to resemble."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Params, lookup
from latent_diffusion.generation import conditions
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.losses.perceptual import LPIPS, load_lpips_params
from latent_diffusion.process import steering
from latent_diffusion.process.diffusion import Denoiser
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.schedules import NoiseSchedule

log = logging.getLogger(__name__)

# distance between a picture and its target -> the LPIPS net that it needs
DISTANCES = {"l2": None, "lpips": "alex"}


def check_classifier(
    classifier: NoisyClassifier | None, schedule: NoiseSchedule, channels: int
) -> None:
    """Raise ValueError for a classifier of other noise, or of latents with other channels."""
    if classifier is not None:
        first = classifier.params.get("input_blocks_0_0")  # of a U-Net; others may lack it
        if first is not None and (width := first["kernel"].shape[2]) != channels:
            raise ValueError(
                f"the classifier is of latents with {width} channels, this model's have {channels}"
            )
        alphas, expected = (np.asarray(s.alphas) for s in (classifier.schedule, schedule))
        if alphas.shape != expected.shape or not np.allclose(alphas, expected, atol=1e-6):
            raise ValueError("the classifier was trained with another noise schedule")


def warn_of_scale(origin: Mapping[str, Any], options: SamplingOptions) -> None:
    """Log a warning if a distilled model gets guidance scales for which it wasn't distilled."""
    low, high = origin.get("guidance_range", (-np.inf, np.inf))
    scales = np.atleast_1d(1.0 if options.guidance_scale is None else options.guidance_scale)
    if wrong := [scale for scale in scales if not low <= scale <= high]:
        allowed = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        log.warning("guidance_scale=%g, but the model is distilled for %s", wrong[0], allowed)


def entries(
    classifier: NoisyClassifier | None, labels: Any, target: Any, channels: int, total: int
) -> dict[str, np.ndarray]:
    """The batch entries [total ...] that a guide reads; ValueError for entries that don't fit."""
    batch = {}
    if (classifier is None) != (labels is None):
        raise ValueError("a classifier guides to classes: give classifier and classifier_labels")
    if classifier is not None:
        end = classifier.unet.out_channels
        batch["guide_label"] = conditions.labels("classifier_labels", labels, end)
    if target is not None:
        target = np.asarray(conditions.in_range(np.asarray(target), "target"), np.float32)
        batch["target"] = target[None] if target.ndim == 3 else target
        if batch["target"].ndim != 4 or batch["target"].shape[3] != channels:
            raise ValueError(f"target has shape {target.shape}, expected [N h w {channels}]")
    return conditions.for_all(batch, total)


def load_distance(name: str) -> Params | None:
    """The parameters of a distance; None for a distance without parameters."""
    net = lookup(DISTANCES, name, "target_distance")
    return None if net is None else jax.tree.map(jnp.asarray, load_lpips_params(net))


def guide(
    batch: Mapping[str, Any],
    schedule: NoiseSchedule,
    first_stage: FirstStage,
    classifier: NoisyClassifier | None,
    distance: Params | None,
    options: SamplingOptions,
) -> Callable[[Denoiser], Denoiser] | None:
    """A function that adds the guides of a batch (see `entries`) to a denoiser; None without any.

    options: have the strengths of both guides, and the name of the distance to the target.
    """
    if not {"guide_label", "target"} & set(batch):
        return None

    def wrap(denoise: Denoiser) -> Denoiser:
        if classifier is not None:
            label = batch["guide_label"]
            denoise = steering.by_classifier(
                denoise,
                schedule,
                lambda z, t: classifier.log_prob(z, t, label),
                options.classifier_scale,
            )
        if "target" in batch:
            target, net = jnp.asarray(batch["target"]), DISTANCES[options.target_distance]
            compare: Any = None
            if net is not None:
                compare = functools.partial(LPIPS(net).apply, {"params": distance or {}})
            likelihood = steering.toward(target, first_stage.decode, compare)
            denoise = steering.by_likelihood(denoise, schedule, likelihood, options.target_scale)
        return denoise

    return wrap
