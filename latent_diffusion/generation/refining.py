"""A model and its refiner in one call: the second one goes on from the latents of the first one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_diffusion.generation.conditions import argument
from latent_diffusion.process.options import OPTIONS
from latent_diffusion.process.plan import plan


def sample(model: Any, refiner: Any, rng: Any, call: Mapping[str, Any]) -> np.ndarray:
    """What `model` and `refiner`, a pair of another model and a share of the noise, make together.

    call: the other arguments and options of `Model.sample`. Both models get the conditions that
    they read, the picture around a `mask`, and whatever is no condition. `z_T`, an `image` without
    mask, `adapters`, `controls` and `image_prompts` are the first one's alone.
    Raises ValueError where the second one doesn't start where the first one stops.
    """
    other, share = _checked(refiner)
    denoisers = [one._need("denoiser") for one in (model, other)]
    mine, theirs = (
        {argument(key) for key in (*one.conditioner.keys, *one.conditioner.optional)}
        for one in denoisers
    )
    first = {**_without(call, theirs - mine), "end": share}
    second = {**_without(call, mine - theirs), "start": share, "z_T": None}
    second |= {"adapters": (), "controls": (), "image_prompts": ()}
    if call["mask"] is None:
        second["image"] = None
    _check_meeting(denoisers, (model.defaults, other.defaults), share, call)
    second["z_T"] = model.sample(rng, **first)
    images: np.ndarray = other.sample(rng, **second)
    return images


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
    """The call without these conditions, also of the unconditional; pictures stay."""
    left_out = {f"{start}{name}" for name in conditions for start in ("", "negative_")}
    return {name: x for name, x in call.items() if name not in left_out - {"image", "mask"}}


def _check_meeting(
    denoisers: list[Any], defaults: tuple[Any, Any], share: float, call: Mapping[str, Any]
) -> None:
    """Raise ValueError where the models have other noise at the end of one and the other's start.

    Files of models bring their own samplers, spacings and numbers of steps.
    """
    options = {name: call[name] for name in OPTIONS if call.get(name) is not None}
    parts = ({**options, "end": share, "start": None}, {**options, "start": share, "end": None})
    (stops, starts) = (
        float(plan(one.schedule, one.prediction, own, part)[0][where])
        for one, own, part, where in zip(denoisers, defaults, parts, (-1, 0), strict=True)
    )
    levels = [float(d.schedule.alpha_t(t)) for d, t in zip(denoisers, (stops, starts), strict=True)]
    if not np.isclose(levels[0], levels[1], atol=1e-6):
        raise ValueError(
            f"the refiner starts at timestep {starts:g}, but the model stops at {stops:g}: give "
            "num_steps, sampler and spacing, which are each model's own by default"
        )
