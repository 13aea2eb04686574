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
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "DPMSolverMultistepScheduler": "dpm_solver_pp_2m",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm",
}


def from_diffusers(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`diffusion` fields, sampling defaults); ValueError for what we have no word for."""
    sampler = lookup(_SAMPLERS, config["_class_name"], "scheduler")
    if config.get("trained_betas") is not None:
        raise ValueError("scheduler_config.json: trained_betas are not supported")
    if config.get("algorithm_type", "dpmsolver++") == "sde-dpmsolver++":
        sampler = "dpm_solver_pp_2m_sde"
    diffusion = {
        "schedule": lookup(_CURVES, config.get("beta_schedule", "linear"), "beta_schedule"),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
        "prediction": lookup(
            _PREDICTIONS, config.get("prediction_type", "epsilon"), "prediction_type"
        ),
    }
    sampling: dict[str, Any] = {"sampler": sampler, "num_steps": 50, **_spacing(sampler, config)}
    if sampler == "ddim":
        sampling["eta"] = 0.0
    return diffusion, sampling


def _spacing(sampler: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_karras_sigmas"):
        return {"spacing": "karras"}
    default = {"lms": "linspace", "euler": "linspace", "euler_ancestral": "linspace"}
    kind = config.get("timestep_spacing", default.get(sampler, "leading"))
    if kind == "linspace":
        continuous = sampler in ("lms", "euler", "euler_ancestral", "heun", "dpm2")
        return {"spacing": "linspace" if continuous else "open"}
    spacing: dict[str, Any] = {"spacing": kind}
    if kind == "leading":
        spacing["offset"] = config.get("steps_offset", 0)
    if sampler in ("ddim", "plms") and not config.get("set_alpha_to_one", sampler == "ddim"):
        spacing["end"] = 0
    return spacing


def to_diffusers(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """A DDIM scheduler's configuration; ValueError where diffusers lacks the schedule."""
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
        "steps_offset": 0,
        "clip_sample": False,
    }
