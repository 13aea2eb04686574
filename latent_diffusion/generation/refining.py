"""A model and its refiner in one call: the refiner continues from the model's latents."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_diffusion.generation.conditions import argument
from latent_diffusion.process.options import OPTIONS
from latent_diffusion.process.plan import plan


def sample(model: Any, refiner: Any, rng: Any, call: Mapping[str, Any]) -> np.ndarray:
    """Images by `model` and `refiner`, a pair of a second model and a share of the noise.

    call: the other arguments and options of `Model.sample`. Both models get the conditions that
    they read, the picture around a `mask`, and all arguments that aren't conditions. Only the first
    gets `z_T`, an `image` without mask, `adapters`, `controls` and `image_prompts`.
    Raises ValueError if the second model doesn't start where the first stops.
    """
    other, share = _checked(refiner)
    if call.get("strength") not in (None, OPTIONS["strength"].off):
        raise ValueError(
            "strength doesn't go with a refiner; in Python, start says where the first model begins"
        )
    denoisers = [x._need("denoiser") for x in (model, other)]
    of_first, of_second = (
        {argument(key) for key in (*denoiser.conditioner.keys, *denoiser.conditioner.optional)}
        for denoiser in denoisers
    )
    first = {**_without(call, of_second - of_first), "end": share}
    second = {**_without(call, of_first - of_second), "start": share, "z_T": None}
    second |= {"adapters": (), "controls": (), "image_prompts": ()}
    if call["mask"] is None:
        second["image"] = None
    _check_meeting(denoisers, (model.defaults, other.defaults), share, call)
    second["z_T"] = model.sample(rng, **first)
    if call.get("progress") is not None:
        second["progress"] = _GoesOn(call["progress"])
    images: np.ndarray = other.sample(rng, **second)
    return images


class _GoesOn:
    """A progress function that goes on: its `total`, if it has one, becomes that of both calls."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._before = progress, getattr(progress, "total", None)

    @property
    def total(self) -> int | None:
        """The number of evaluations of both models."""
        total: int | None = getattr(self._progress, "total", None)
        return total

    @total.setter
    def total(self, total: int) -> None:
        if hasattr(self._progress, "total"):
            self._progress.total = (self._before or 0) + total

    def __call__(self, t: Any) -> None:
        """Pass an evaluation on."""
        self._progress(t)


def _checked(refiner: Any) -> tuple[Any, float]:
    """The pair; ValueError for anything else, and for a share that isn't between 0 and 1."""
    try:
        other, share = refiner
        if not (hasattr(other, "denoiser") and 0 < share < 1):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            "refiner is a pair of a model and a share of the noise in (0, 1), such as "
            f"(model, 0.2), not {str(refiner)[-80:]}"
        ) from None
    return other, share


def _without(call: Mapping[str, Any], conditions: set[str]) -> dict[str, Any]:
    """The call without these conditions and those with `negative_`; pictures stay."""
    left_out = {f"{start}{name}" for name in conditions for start in ("", "negative_")}
    return {name: x for name, x in call.items() if name not in left_out - {"image", "mask"}}


def _check_meeting(
    denoisers: list[Any], defaults: tuple[Any, Any], share: float, call: Mapping[str, Any]
) -> None:
    """Raise ValueError if the noise at the first model's end isn't that at the second's start.

    They may differ, since each model's file has a sampler, a spacing and a number of steps.
    """
    options = {name: call[name] for name in OPTIONS if call.get(name) is not None}
    parts = ({**options, "end": share, "start": None}, {**options, "start": share, "end": None})
    (stops, starts) = (
        float(plan(denoiser.schedule, denoiser.prediction, usual, part)[0][where])
        for denoiser, usual, part, where in zip(denoisers, defaults, parts, (-1, 0), strict=True)
    )
    levels = [float(d.schedule.alpha_t(t)) for d, t in zip(denoisers, (stops, starts), strict=True)]
    if not np.isclose(levels[0], levels[1], atol=1e-6):
        raise ValueError(
            f"the refiner starts at timestep {starts:g}, but the model stops at {stops:g}: give "
            "num_steps, sampler and spacing, which are each model's own by default"
        )
