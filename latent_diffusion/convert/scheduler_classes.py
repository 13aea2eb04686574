"""The scheduler classes of diffusers that we support: settings, their defaults and their meaning.

The facts are those of diffusers 0.42.1. Each class has a `Scheduler`, which lists its settings and
translates them into options of `sample`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latent_diffusion.convert import scheduler_options as read
from latent_diffusion.convert.scheduler_options import CURVES, Settings
from latent_diffusion.core.types import Config


@dataclass(frozen=True)
class Scheduler:
    """One class. read: complete settings -> options of `sample`; ValueError without an equivalent.

    used: setting -> the class's default. only: setting -> the values that we support, the default
    first. harmless: settings that don't change the result if those in `only` have allowed values.
    aliases: setting -> values of other classes, and the values that this class takes them for.
    noise: complete settings -> `diffusion` fields, for a class without betas.
    """

    read: Callable[[Settings], Config]
    used: Settings
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    noise: Callable[[Settings], Config] | None = None

    def names(self) -> set[str]:
        """The names of all settings."""
        return {*self.used, *self.only, *self.harmless}


# ------------------------------------------------------------------------ settings of many classes

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
_LATENT_BETAS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_RESCALE = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CURVES = dict.fromkeys(CURVES, False)
_ENDS: Settings = {"sigma_min": None, "sigma_max": None}
_FINAL = {"final_sigmas_type": "zero"}
_SOLVER = {"solver_type": "midpoint", "lower_order_final": True}
_ORDERS = {"solver_order": (2, 1, 3)}
_TRAINED = {"trained_betas": (None,)}
_FLOW = {"use_flow_sigmas": (False,)}
_OF_FLOW = ("flow_shift", "use_dynamic_shifting", "time_shift_type")
_CUT = {"lambda_min_clipped": (float("-inf"),), "variance_type": (None,)}
_OF_OTHERS = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}


# With "sigma_min", the final latents of these classes lack the scale of alpha.
_CLEAN = {"final_sigmas_type": ("zero",)}
_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras",
    "rho": 7.0, "num_train_timesteps": 1000, "prediction_type": "epsilon",
}  # fmt: skip
_K = {**_LATENT_BETAS, **_LINSPACE, **_CURVES}
_OPEN = {**_BETAS, **_THRESHOLD, **_CURVES, **_SOLVER}
_TURBO = {**_LATENT_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50}
_DDIM = Scheduler(
    read.ddim,
    {**_BETAS, **_CLIP, **_THRESHOLD, **_LEADING, **_RESCALE, "set_alpha_to_one": True},
    _TRAINED,
)
_DDPM = Scheduler(
    read.ddpm,
    {**_BETAS, **_CLIP, **_THRESHOLD, **_LEADING, **_RESCALE},
    {**_TRAINED, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
)
SCHEDULERS = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": Scheduler(
        read.pndm,
        {**_BETAS, **_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False},
        _TRAINED,
    ),
    "EulerDiscreteScheduler": Scheduler(
        read.euler,
        {
            **_BETAS, **_LINSPACE, **_CURVES, **_ENDS, **_RESCALE, **_FINAL,
            "timestep_type": "discrete",
        },
        {**_TRAINED, "interpolation_type": ("linear",)},
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(
        read.after_k("euler_ancestral"), {**_BETAS, **_LINSPACE, **_RESCALE}, _TRAINED
    ),
    "HeunDiscreteScheduler": Scheduler(
        read.after_k("heun"), {**_K, **_CLIP, "clip_sample": False}, _TRAINED
    ),
    "KDPM2DiscreteScheduler": Scheduler(read.after_k("dpm2"), _K, _TRAINED),
    "KDPM2AncestralDiscreteScheduler": Scheduler(read.after_k("dpm2_ancestral"), _K, _TRAINED),
    "LMSDiscreteScheduler": Scheduler(
        read.after_k("lms"), {**_BETAS, **_LINSPACE, **_CURVES}, _TRAINED
    ),
    "DPMSolverSDEScheduler": Scheduler(
        read.after_k("dpm_solver_pp_sde"), _K, _TRAINED, ("noise_sampler_seed",)
    ),
    "DPMSolverMultistepScheduler": Scheduler(
        read.dpm_multistep,
        {
            **_OPEN, **_LINSPACE, **_RESCALE, **_FINAL, "euler_at_final": False,
            "algorithm_type": "dpmsolver++", "use_lu_lambdas": False,
        },
        {**_TRAINED, **_ORDERS, **_FLOW, **_CUT},
        _OF_FLOW,
        _OF_OTHERS,
    ),
    "DPMSolverSinglestepScheduler": Scheduler(
        read.dpm_singlestep,
        {**_OPEN, **_FINAL, "lower_order_final": False, "algorithm_type": "dpmsolver++"},
        {**_TRAINED, **_ORDERS, **_FLOW, **_CUT},
        _OF_FLOW,
        _OF_OTHERS,
    ),
    "UniPCMultistepScheduler": Scheduler(
        read.unipc,
        {
            **_OPEN, **_LINSPACE, **_RESCALE, **_FINAL, **_ENDS, "solver_type": "bh2",
            "disable_corrector": [],
        },
        {
            **_TRAINED, **_ORDERS, **_FLOW, "predict_x0": (True,), "solver_p": (None,),
            "shift_terminal": (None,),
        },
        _OF_FLOW,
        {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
    ),
    "DEISMultistepScheduler": Scheduler(
        read.deis,
        {**{k: v for k, v in _OPEN.items() if k != "solver_type"}, **_LINSPACE},
        {**_TRAINED, **_ORDERS, **_FLOW, "algorithm_type": ("deis", "dpmsolver", "dpmsolver++")},
        ("solver_type", *_OF_FLOW),
    ),
    "EDMEulerScheduler": Scheduler(read.edm_euler, _EDM, _CLEAN, noise=read.edm_noise),
    "EDMDPMSolverMultistepScheduler": Scheduler(
        read.edm_dpm,
        {
            **_EDM, **_THRESHOLD, **_SOLVER, "euler_at_final": False,
            "algorithm_type": "dpmsolver++",
        },
        {**_ORDERS, **_CLEAN},
        aliases=_OF_OTHERS,
        noise=read.edm_noise,
    ),
    "IPNDMScheduler": Scheduler(
        lambda settings: {"sampler": "ipndm", "spacing": "trailing"},
        {"num_train_timesteps": 1000},
        _TRAINED,
        noise=lambda settings: {"schedule": "ipndm", "prediction": "v"},
    ),
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        lambda settings: {"sampler": "ddim", "spacing": "shifted", "shift": settings["shift"]},
        {"num_train_timesteps": 1000, "shift": 1.0},
        {
            **dict.fromkeys(("use_dynamic_shifting", "invert_sigmas", *CURVES), (False,)),
            "shift_terminal": (None,), "stochastic_sampling": (False,),
        },
        ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
        noise=lambda settings: {"schedule": "rectified_flow", "prediction": "flow"},
    ),
    "LCMScheduler": Scheduler(
        read.lcm,
        {**_TURBO, **_CLIP, "clip_sample": False, **_THRESHOLD, **_RESCALE,
         "timestep_scaling": 10.0},
        _TRAINED,
        ("set_alpha_to_one", "steps_offset", "timestep_spacing"),
    ),
    "TCDScheduler": Scheduler(
        read.distilled("tcd", eta=0.0, last=0),
        {**_TURBO, **_RESCALE},
        _TRAINED,
        (
            "set_alpha_to_one", "steps_offset", "timestep_spacing", "timestep_scaling",
            *_CLIP, *_THRESHOLD,
        ),
    ),
}  # fmt: skip
