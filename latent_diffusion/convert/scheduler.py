"""diffusers' scheduler_config.json: our noise schedule, prediction and sampling defaults."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion.types import lookup

# A U-Net without a schedule gets Stable Diffusion's.
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
# class → (our sampler, its default timestep_spacing)
SCHEDULERS = {
    "DDPMScheduler": ("ddpm", "leading"),
    "DDIMScheduler": ("ddim", "leading"),
    "PNDMScheduler": ("plms", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", "linspace"),
    "HeunDiscreteScheduler": ("heun", "linspace"),
    "KDPM2DiscreteScheduler": ("dpm2", "linspace"),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_ancestral", "linspace"),
    "LMSDiscreteScheduler": ("lms", "linspace"),
    "DPMSolverMultistepScheduler": ("multistep", "linspace"),
    "DPMSolverSinglestepScheduler": ("dpm_solver_pp_singlestep", "linspace"),
    "UniPCMultistepScheduler": ("unipc", "linspace"),
    "DEISMultistepScheduler": ("deis", "linspace"),
    "LCMScheduler": ("lcm", "leading"),
}
# algorithm_type and solver_order of the multistep solver → our sampler and its options
_MULTISTEP: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver 1": ("ddim", {}),
    "dpmsolver++ 1": ("ddim", {}),
    "sde-dpmsolver++ 1": ("ddim", {"eta": 1.0}),
    "dpmsolver 2": ("dpm_solver_2m", {}),
    "dpmsolver++ 2": ("dpm_solver_pp_2m", {}),
    "sde-dpmsolver++ 2": ("dpm_solver_pp_2m_sde", {}),
    "dpmsolver++ 3": ("dpm_solver_pp_3m_sde", {"eta": 0.0}),
    "sde-dpmsolver++ 3": ("dpm_solver_pp_3m_sde", {}),
}
_SOLVERS = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}
# Classes whose timesteps leave out t = 0, and classes whose timesteps are integers.
_OPEN = _SOLVERS | {"DEISMultistepScheduler"}
_INTEGER = {"DDPMScheduler", "DDIMScheduler", "PNDMScheduler"}
# Configs carry settings over from other classes, so a setting is read only for classes that use it:
# these are the classes, with their defaults.
_CLIP_SAMPLE = {"DDPMScheduler": True, "DDIMScheduler": True}
_CLIP_SAMPLE |= {"HeunDiscreteScheduler": False, "LCMScheduler": False}
_SET_ALPHA_TO_ONE = {"DDIMScheduler": True, "PNDMScheduler": False}
_FINAL_SIGMAS_TYPE = _SOLVERS | {"EulerDiscreteScheduler"}
# Settings that change a sampler, with the values that ours can compute: (default, allowed).
_FIXED: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "PNDMScheduler": {"skip_prk_steps": (False, (True,))},
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
        "solver_order": (2, (2,)),
        "solver_type": ("midpoint", ("midpoint",)),
    },
    "UniPCMultistepScheduler": {
        "solver_type": ("bh2", ("bh2",)),
        "predict_x0": (True, (True,)),
    },
    "DDPMScheduler": {"variance_type": ("fixed_small", ("fixed_small", "fixed_large"))},
    "EulerDiscreteScheduler": {"timestep_type": ("discrete", ("discrete",))},
}
_UNKNOWN = ("trained_betas", "thresholding", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


def from_diffusers(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a `scheduler_config.json`: (`diffusion` fields, sampling defaults).

    Absent settings have the defaults of their class. Raises ValueError of one line for a setting
    that no sampler of ours has.
    """
    name = config["_class_name"]
    sampler, default_spacing = lookup(SCHEDULERS, name, "scheduler")
    for field in _UNKNOWN:
        if config.get(field):
            raise ValueError(f"{name} with {field} has no equal here")
    for field, (default, allowed) in _FIXED.get(name, {}).items():
        if (value := config.get(field, default)) not in allowed:
            values = " or ".join(map(str, allowed))
            raise ValueError(f"{name} with {field}={value} has no equal here; allowed: {values}")
    options: dict[str, Any] = {}
    if sampler == "multistep":
        sampler, options = _multistep(config)
    elif sampler in ("unipc", "deis"):
        options = {"order": config.get("solver_order", 2)}
    elif sampler == "ddpm" and config.get("variance_type") == "fixed_large":
        options = {"large_variance": 1.0}
    if name in _CLIP_SAMPLE and config.get("clip_sample", _CLIP_SAMPLE[name]):
        options["clip_x0"] = config.get("clip_sample_range", 1.0)
    sampling = {"sampler": sampler, "num_steps": 4 if sampler == "lcm" else 50, **options}
    return _diffusion(config), {**sampling, **_spacing(config, name, default_spacing)}


def _diffusion(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("prediction_type", "epsilon")
    return {
        "schedule": lookup(_CURVES, config.get("beta_schedule", "linear"), "beta_schedule"),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "prediction": lookup(_PREDICTIONS, kind, "prediction_type"),
    }


def _multistep(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind = f"{config.get('algorithm_type', 'dpmsolver++')} {config.get('solver_order', 2)}"
    if kind not in _MULTISTEP:
        kinds = ", ".join(_MULTISTEP)
        raise ValueError(f"unknown algorithm_type and solver_order {kind}; known: {kinds}")
    sampler, options = _MULTISTEP[kind]
    if sampler.startswith("dpm_solver_pp"):
        options = {**options, "solver_type": config.get("solver_type", "midpoint")}
    return sampler, options


def _spacing(config: Mapping[str, Any], name: str, default: str) -> dict[str, Any]:
    if name == "LCMScheduler":
        return {"spacing": "lcm", "distilled_steps": config.get("original_inference_steps", 50)}
    # Sampling ends at ᾱ_0, not at clean data, where the setting of the last alpha or sigma says so.
    keeps_noise = name == "DEISMultistepScheduler"
    if name in _SET_ALPHA_TO_ONE:
        keeps_noise = not config.get("set_alpha_to_one", _SET_ALPHA_TO_ONE[name])
    elif name in _FINAL_SIGMAS_TYPE:
        keeps_noise = config.get("final_sigmas_type", "zero") == "sigma_min"
    end = {"end": 0} if keeps_noise else {}
    if name not in _INTEGER:
        for curve in ("karras", "exponential"):
            if config.get(f"use_{curve}_sigmas"):
                return {"spacing": curve, **end}
    kind = config.get("timestep_spacing", default)
    if name == "DPMSolverSinglestepScheduler":  # it ignores the setting
        kind = "linspace"
    linspace = "open" if name in _OPEN else "uniform" if name in _INTEGER else "linspace"
    leading = "open_leading" if name in _OPEN else "leading"
    table = {
        "leading": {"spacing": leading, "offset": config.get("steps_offset", 0)},
        "trailing": {"spacing": "trailing"},
        "linspace": {"spacing": linspace},
    }
    return {**lookup(table, kind, "timestep_spacing"), **end}


def to_diffusers(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a DDIM scheduler; ValueError where diffusers lacks the schedule."""
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
        "steps_offset": 1,  # of "leading" only; pipelines complain of any other number
        "clip_sample": False,
    }
