"""A description of a model in JSON: its conditions, options and limits."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from latent_diffusion.generation.conditions import argument
from latent_diffusion.generation.model import Model
from latent_diffusion.generation.start_picture import changes_pictures
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.spacings import SPACINGS
from latent_diffusion.serve.requests import PICTURED, Limits, options_of

_CHOICES: dict[str, Iterable[str]] = {"sampler": SAMPLERS, "spacing": SPACINGS}
# Fields of conditioners that describe the values of a condition.
_DETAILS = ("num_classes", "vocab_size", "max_length", "width")


def describe(
    model: Model, name: str, limits: Limits, adapters: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts about a model, from which the page builds its controls; other clients may read them.

    The names of the loaded `adapters` are listed by the argument of a request that takes them.
    """
    conditioner = model.conditioner
    height, width = model.trained_size
    conditions: dict[str, dict[str, Any]] = {}
    needed = set()
    for part in conditioner.parts():
        details = {field: getattr(part, field) for field in _DETAILS if hasattr(part, field)}
        if "noise_level" in getattr(part, "optional", ()):
            details["max_noise_level"] = part.end_of_levels  # the API's name for this bound
        usual = part.defaults((height, width)) if hasattr(part, "defaults") else {}
        for key in (*part.keys, *getattr(part, "optional", ())):
            conditions.setdefault(argument(key), {}).update(details)
            if key in part.keys and key not in usual:
                needed.add(argument(key))
    return {
        "name": name,
        "kind": "denoiser" if model.prior is None else "prior",
        "size": [height, width],
        "factor": model.downsampling,
        "conditions": {
            condition: {"needed": condition in needed, **details}
            for condition, details in conditions.items()
        },
        "negative_prompts": model.prior is None and "prompts" in conditions,
        "changes_pictures": changes_pictures(model.conditioner.keys),
        **{
            field: sorted(name for name, x in adapters.items() if x.argument == field)
            for field in ("adapters", *PICTURED)
        },
        "options": _options(model),
        "limits": dataclasses.asdict(limits),
    }


def _options(model: Model) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": option.kind.__name__,
            "many": option.count != 1,
            "help": option.help,
            "range": option.range,
            "default": model.defaults.get(name, option.default),
            "choices": sorted(_CHOICES.get(name, ())),
        }
        for name, option in options_of(model).items()
        if option.flag
    ]
