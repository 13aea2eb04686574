"""Noise schedule, prediction and sampling defaults in diffusers' scheduler_config.json."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from latent_diffusion.convert.scheduler_classes import SCHEDULERS, Scheduler
from latent_diffusion.convert.scheduler_options import CURVES
from latent_diffusion.core.types import Config, lookup

log = logging.getLogger(__name__)

# Stable Diffusion's schedule, for a U-Net without one; see also `diffusers._assumed`.
ASSUMED = {
    "schedule": "linear",
    "num_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "zero_terminal_snr": False,
    "prediction": "eps",
}
_CURVES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Settings of an unknown class that its config doesn't have.
_UNKNOWN = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
KNOWN = {name for record in SCHEDULERS.values() for name in record.names()}


def from_diffusers(config: Mapping[str, Any]) -> tuple[Config, Config]:
    """Read a `scheduler_config.json`: (`diffusion` fields, sampling defaults).

    Absent settings have the defaults of their class. Where none of our samplers does what the class
    or a setting asks for, a warning is logged, and the default sampler gets an unknown name, so
    that users must choose another. Raises a ValueError of one line for a noise schedule or a
    prediction that we don't have, and for values of a wrong type.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError("a scheduler's config names no _class_name")
    if config.get("trained_betas") is not None:
        raise ValueError(f"{name} with trained_betas has no equal here")
    record = SCHEDULERS.get(name)
    if record is None:
        settings = _complete(_UNKNOWN, config, name)
        log.warning("no sampler here does what a %s does: name another when sampling", name)
        return _diffusion(settings), {"sampler": name, "num_steps": 50}
    strange = [key for key in config if key not in KNOWN and not key.startswith("_")]
    if strange:
        log.warning("%s doesn't know %s, which changes nothing", name, ", ".join(strange))
    settings = _complete(record.used, config, name, record.aliases)
    if record.noise is None:
        diffusion = _diffusion(settings)
    else:
        number = {"num_timesteps": settings["num_train_timesteps"]}
        diffusion = {**ASSUMED, **number, **record.noise(settings)}
    try:
        settings |= _allowed(record, config)
        return diffusion, {"num_steps": 50, **record.read(settings)}
    except ValueError as error:
        log.warning("no sampler here does what this %s does (%s): name another", name, error)
        return diffusion, {"sampler": f"{name}: {error}", "num_steps": 50}


def _complete(
    used: Mapping[str, Any],
    config: Mapping[str, Any],
    name: str,
    aliases: Mapping[str, Mapping[str, str]] | None = None,
) -> Config:
    """All used settings, checked to have the types of their defaults."""
    settings = {**used, **{key: config[key] for key in used if key in config}}
    for key, value in settings.items():
        default = used[key]
        if isinstance(default, bool) and value is None:
            settings[key] = False
        elif not _fits(value, default):
            raise ValueError(f"{name} with {key}={value!r}: it must be like {default!r}")
        elif isinstance(value, str):
            settings[key] = (aliases or {}).get(key, {}).get(value, value)
    return settings


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default; None as default is for an optional number."""
    if default is None or isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (default is None and value is None) or (number and math.isfinite(value))
    if isinstance(default, list):
        return isinstance(value, list) and all(_fits(entry, 0) for entry in value)
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


def _allowed(record: Scheduler, config: Mapping[str, Any]) -> Config:
    """The settings of which we support few values. Raises ValueError for another value."""
    settings = {key: config.get(key, allowed[0]) for key, allowed in record.only.items()}
    for key, value in settings.items():
        allowed = record.only[key]
        if value not in allowed and not (value is None and allowed[0] is False):
            values = " or ".join(map(str, allowed))
            raise ValueError(f"{key}={value!r} has no equal here; allowed: {values}")
    # In diffusers, curves use these settings also in classes whose signatures lack them.
    curved = any(config.get(name) for name in CURVES)
    for key in ("sigma_min", "sigma_max"):
        if curved and key not in record.used and config.get(key) is not None:
            raise ValueError(f"{key} has no equal here")
    return settings


def _diffusion(settings: Mapping[str, Any]) -> Config:
    """The `diffusion` fields. Raises ValueError for a curve or a prediction that we don't have."""
    kind = settings["prediction_type"]
    return {
        "schedule": lookup(_CURVES, settings["beta_schedule"], "beta_schedule"),
        "num_timesteps": settings["num_train_timesteps"],
        "beta_start": settings["beta_start"],
        "beta_end": settings["beta_end"],
        "zero_terminal_snr": settings.get("rescale_betas_zero_snr", False),
        "prediction": lookup(_PREDICTIONS, kind, "prediction_type"),
    }


def to_diffusers(
    diffusion: Mapping[str, Any], sampling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config of a DDIM, flow or LCM scheduler; ValueError where diffusers has no such schedule.

    sampling: the model's sampling defaults; the sampler "lcm" selects the LCM scheduler, and
    `shift` is that of a flow.
    """
    flow = (diffusion["schedule"], diffusion["prediction"]) == ("rectified_flow", "flow")
    if sampling is not None and sampling.get("sampler") == "lcm":
        if flow:
            raise ValueError("diffusers' LCMScheduler follows no flow; save the model as orbax")
        settings = {"original_inference_steps": sampling.get("distilled_steps") or 50}
        if (scaling := sampling.get("timestep_scaling")) is not None:
            settings["timestep_scaling"] = scaling
        return {**to_diffusers(diffusion), "_class_name": "LCMScheduler", **settings}
    if flow:
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": diffusion["num_timesteps"],
            "shift": float((sampling or {}).get("shift") or 1.0),
        }
    curves = {ours: theirs for theirs, ours in _CURVES.items()}
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": diffusion["num_timesteps"],
        "beta_start": diffusion["beta_start"],
        "beta_end": diffusion["beta_end"],
        "beta_schedule": lookup(curves, diffusion["schedule"], "schedule of diffusers"),
        "prediction_type": lookup(predictions, diffusion["prediction"], "prediction of diffusers"),
        "rescale_betas_zero_snr": diffusion["zero_terminal_snr"],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,  # for "leading" alone; pipelines complain of any other number
        "clip_sample": False,
    }
