"""Errors of a first stage's reconstructions: PSNR, SSIM, LPIPS, and the set's Fréchet distance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_diffusion.core.types import Params, lookup
from latent_diffusion.evaluate.collect import Report, collect
from latent_diffusion.evaluate.features import FeatureNet, levels_of
from latent_diffusion.evaluate.frechet import gaussian, measure_frechet
from latent_diffusion.evaluate.measured import Measured, check_count, mean_of
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.losses.perceptual import LPIPS
from latent_diffusion.nets.losses.similarity import psnr, ssim

METRICS = {"psnr": psnr, "ssim": ssim, "lpips": None, "rfid": None, "rfd": None}


def collect_reconstructions(
    first_stage: FirstStage,
    read: Callable[[int, int], np.ndarray],
    count: int,
    metrics: list[str],
    directory: Path,
    *,
    lpips: tuple[str, Params] | None = None,
    net: FeatureNet | None = None,
    batch_size: int = 64,
    report: Report = lambda done: None,
) -> dict[str, np.ndarray]:
    """Errors [N] and features [N D] of pictures and their reconstructions by posterior modes.

    read(start, stop): uint8 pictures. lpips: (name of the net, its parameters) for the metric
    "lpips". net: for "rfd". Reconstructions are first clipped and rounded to bytes, as in files.
    """
    for metric in metrics:
        lookup(METRICS, metric, "reconstruction metric")
    constants = {
        "first_stage": first_stage,
        "lpips": lpips[1] if lpips else {},
        "net": net.params if net else {},
    }

    def step(
        state: Any, constants: Any, batch: Any, rng: Any, *, axis_name: str | None = None
    ) -> dict[str, jax.Array]:
        levels = levels_of(batch["image"])
        x, stage = levels / 127.5 - 1, constants["first_stage"]
        levels_rec = levels_of(stage.decode(stage.encode({"image": x})))
        x_rec = levels_rec / 127.5 - 1
        values: dict[str, Any] = {m: f(x, x_rec) for m, f in METRICS.items() if f and m in metrics}
        if lpips:
            values["lpips"] = LPIPS(lpips[0]).apply({"params": constants["lpips"]}, x, x_rec)
        if net:
            values["features"] = net.apply(constants["net"], levels)["features"]
            values["features_rec"] = net.apply(constants["net"], levels_rec)["features"]
        return values

    return collect(step, constants, read, count, directory, batch_size, report)


def score_reconstructions(
    arrays: dict[str, np.ndarray], lpips_net: str, net: str
) -> dict[str, Measured]:
    """Means over the pictures, with their standard errors, and the r-FD.

    The names of LPIPS and r-FD end in the net's name: `lpips_alex`, `rfd_alexnet`. The r-FD of
    Inception's features is called `rfid`.
    """
    results = {}
    for metric in ("psnr", "ssim", "lpips"):
        if metric in arrays:
            check_count(metric, len(arrays[metric]), 2)
            name = f"lpips_{lpips_net}" if metric == "lpips" else metric
            results[name] = mean_of(arrays[metric])
    if "features" in arrays:
        name = "rfid" if net == "inception" else f"rfd_{net}"
        real = gaussian(arrays["features"])
        results[name] = measure_frechet(arrays["features_rec"], real, name)
    return results
