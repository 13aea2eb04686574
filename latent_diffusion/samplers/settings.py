"""Sampling options from the scheduler config of a diffusers pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latent_diffusion.types import lookup


@dataclass(frozen=True)
class Settings:
    """What a foreign scheduler means here.

    schedule: arguments of `schedules.make_schedule`. prediction: a name in `PREDICTIONS`.
    sampler, options: a name in `SAMPLERS` and its options. spacing, spacing_options: a name in
    `SPACINGS` and its options, `end` among them.
    """

    schedule: dict[str, Any]
    prediction: str
    sampler: str
    options: dict[str, Any] = field(default_factory=dict)
    spacing: str = "leading"
    spacing_options: dict[str, Any] = field(default_factory=dict)


BETA_SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# class -> (sampler, its default timestep_spacing)
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
# (algorithm_type, solver_order) of the multistep solver -> sampler and options
MULTISTEP: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {
    ("dpmsolver++", 2): ("dpm_solver_pp_2m", {}),
    ("sde-dpmsolver++", 2): ("dpm_solver_pp_2m_sde", {}),
    ("dpmsolver", 2): ("dpm_solver_2m", {}),
    ("dpmsolver++", 3): ("dpm_solver_pp_3m_sde", {"eta": 0.0}),
    ("sde-dpmsolver++", 3): ("dpm_solver_pp_3m_sde", {}),
}
# Solvers that work between noise levels, whose linspace leaves out t = 0.
OPEN = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
}


def from_diffusers(config: Mapping[str, Any]) -> Settings:
    """Our settings for a `scheduler_config.json`; absent fields have that scheduler's defaults.

    Raises ValueError, in one line, for what we have no equal of.
    """
    name = config.get("_class_name", "DDIMScheduler")
    sampler, default_spacing = lookup(SCHEDULERS, name, "scheduler")
    options: dict[str, Any] = {}
    if sampler == "plms" and not config.get("skip_prk_steps", False):
        raise ValueError("PNDMScheduler with skip_prk_steps=False has no equal here; allowed: True")
    if sampler == "multistep":
        sampler, options = _multistep(config)
    elif sampler in ("unipc", "deis"):
        options = {"order": config.get("solver_order", 2)}
    elif sampler == "ddpm" and config.get("variance_type", "fixed_small") == "fixed_large":
        options = {"large_variance": 1.0}
    kind = lookup(PREDICTION_TYPES, config.get("prediction_type", "epsilon"), "prediction_type")
    spacing, own = _spacing(config, name, default_spacing)
    return Settings(_schedule(config), kind, sampler, options, spacing, own)


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    beta_schedule = config.get("beta_schedule", "linear")
    fields = {
        "name": lookup(BETA_SCHEDULES, beta_schedule, "beta_schedule"),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 2e-2),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }
    if config.get("trained_betas") is not None:
        fields["betas"] = tuple(config["trained_betas"])
    return fields


def _multistep(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    key = (config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2))
    if key[1] == 1:  # the first order is DDIM, with or without noise
        return "ddim", {"eta": 1.0} if key[0].startswith("sde") else {}
    if key not in MULTISTEP:
        known = ", ".join(f"{kind} {order}" for kind, order in MULTISTEP)
        raise ValueError(
            f"unknown algorithm_type and solver_order {key[0]} {key[1]}; known: {known}"
        )
    sampler, options = MULTISTEP[key]
    if sampler != "dpm_solver_2m":
        options = {**options, "solver_type": config.get("solver_type", "midpoint")}
    return sampler, options


def _spacing(config: Mapping[str, Any], name: str, default: str) -> tuple[str, dict[str, Any]]:
    if name == "LCMScheduler":
        return "lcm", {"distilled_steps": config.get("original_inference_steps", 50)}
    # Sampling ends at ᾱ_0 instead of clean data where the final alpha says so.
    keeps_noise = not config.get("set_alpha_to_one", name != "PNDMScheduler")
    keeps_noise |= name == "DEISMultistepScheduler"
    keeps_noise |= config.get("final_sigmas_type", "zero") == "sigma_min"
    end = {"end": 0} if keeps_noise else {}
    for flag, spacing in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
    ):
        if config.get(flag):
            return spacing, end
    table = {
        "leading": ("leading", {"offset": config.get("steps_offset", 0)}),
        "trailing": ("trailing", {}),
        "linspace": ("open" if name in OPEN else "linspace", {}),
    }
    spacing, own = lookup(table, config.get("timestep_spacing", default), "timestep_spacing")
    return spacing, {**own, **end}
