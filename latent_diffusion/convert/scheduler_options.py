"""Functions: complete settings of a diffusers scheduler -> options of `sample`.

`scheduler_classes` assigns them to the classes. They raise a ValueError that names a setting
without an equivalent here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from latent_diffusion.core.types import Config, lookup

Settings = Mapping[str, Any]
CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


# ------------------------------------------------------------------------------------- timesteps


def _timesteps(settings: Settings, linspace: str, leading: str = "leading") -> Config:
    """The spacing. linspace, leading: our names of diffusers' spacings of these names."""
    offset = {"offset": settings["steps_offset"]}
    table: dict[str, Config] = {
        "linspace": {"spacing": linspace},
        "leading": {"spacing": leading, **offset},
        "trailing": {"spacing": "trailing"},
    }
    return lookup(table, settings["timestep_spacing"], "timestep_spacing")


def _end(settings: Settings) -> Config:
    """The end of sampling: clean data, or the noise of timestep 0."""
    table: dict[str, Config] = {"zero": {}, "sigma_min": {"last": 0}}
    return lookup(table, settings["final_sigmas_type"], "final_sigmas_type")


def _curve(settings: Settings) -> str | None:
    """The name of the curve that the sigmas follow, or None."""
    curves = [name for name in CURVES if settings.get(name)]
    if len(curves) > 1:
        raise ValueError(f"{' and '.join(curves)} exclude each other")
    return curves[0].split("_")[1] if curves else None


def _along_curve(settings: Settings, curve: str, within: Config) -> Config:
    """The curve between sigma_min and sigma_max, by default the ends of the spacing `within`."""
    bounds = {"within": within["spacing"]}
    bounds |= {name: value for name, value in within.items() if name == "offset"}
    sigmas = {name: settings.get(name) for name in ("sigma_min", "sigma_max")}
    bounds |= {name: value for name, value in sigmas.items() if value is not None}
    return {"spacing": curve, **bounds}


def _k_timesteps(settings: Settings) -> Config:
    """The timesteps of classes after k-diffusion: fractional, curves between a spacing's ends."""
    plain = _timesteps(settings, "linspace")
    curve = _curve(settings)
    start = {} if settings["timestep_spacing"] == "leading" else {"spread": "sigma"}
    return {**(plain if curve is None else _along_curve(settings, curve, plain)), **start}


def _open_timesteps(settings: Settings) -> Config:
    """The timesteps of DPM-Solver and similar classes: none at t = 0, whole for the network."""
    if settings.get("use_lu_lambdas"):
        if _curve(settings) is None:
            settings = {**settings, "use_exponential_sigmas": True}
        elif not settings["use_karras_sigmas"]:
            raise ValueError("use_lu_lambdas excludes other curves")
    curve = _curve(settings)
    if curve is None:
        return _timesteps(settings, "open", "open_leading")
    rounded = curve == "karras" or settings.get("use_lu_lambdas")
    cosine = settings["beta_schedule"] == "squaredcos_cap_v2" and "use_lu_lambdas" in settings
    rounding = "round" if rounded and not cosine else "floor"
    spacing = _along_curve(settings, curve, {"spacing": "linspace"})
    return {**spacing, "network_timesteps": rounding}


# --------------------------------------------------------------------------------- estimates of z_0


def _clipped(settings: Settings) -> Config:
    """The constraint on z_0."""
    if settings.get("thresholding"):
        return {
            "dynamic_threshold": settings["dynamic_thresholding_ratio"],
            "threshold_limit": settings["sample_max_value"],
        }
    return {"clip_x0": settings["clip_sample_range"]} if settings.get("clip_sample") else {}


# ---------------------------------------------------------------------------------------- classes


def ddpm(settings: Settings) -> Config:
    """DDPM and its parallel form."""
    kind = settings["variance_type"]
    # With this variance, diffusers adds noise to the final result unless the last timestep is 0.
    ends_at_0 = {"linspace": True, "leading": settings["steps_offset"] == 0}
    if kind == "fixed_large" and not ends_at_0.get(settings["timestep_spacing"], False):
        raise ValueError("variance_type=fixed_large has no equal where the last timestep isn't 0")
    large = {"large_variance": 1.0} if kind == "fixed_large" else {}
    return {"sampler": "ddpm", **large, **_clipped(settings), **_timesteps(settings, "uniform")}


def _even(settings: Settings) -> Config:
    """The timesteps of classes whose steps span T // S timesteps with every spacing."""
    if settings["timestep_spacing"] == "linspace":
        raise ValueError("timestep_spacing=linspace has no equal here: its steps overlap")
    end = {} if settings["set_alpha_to_one"] else {"last": 0}
    return {**_timesteps(settings, "uniform"), **end}


def ddim(settings: Settings) -> Config:
    """DDIM and its parallel form."""
    return {"sampler": "ddim", **_clipped(settings), **_even(settings)}


def pndm(settings: Settings) -> Config:
    """PNDM without Runge–Kutta steps."""
    if not settings["skip_prk_steps"]:
        raise ValueError("skip_prk_steps=False has no equal here; allowed: True")
    table: dict[str, Config] = {"epsilon": {}, "v_prediction": {"extrapolated": "v"}}
    kind = lookup(table, settings["prediction_type"], "prediction_type of a PNDMScheduler")
    return {"sampler": "plms", **kind, **_even(settings)}


def after_k(sampler: str) -> Callable[[Settings], Config]:
    """The reader of a class after k-diffusion without further settings."""

    def read(settings: Settings) -> Config:
        return {"sampler": sampler, **_clipped(settings), **_k_timesteps(settings)}

    return read


def euler(settings: Settings) -> Config:
    """Euler's method."""
    continuous = settings["timestep_type"] == "continuous"
    if continuous and settings["prediction_type"] == "v_prediction":
        raise ValueError("timestep_type=continuous has no equal for v_prediction")
    return {"sampler": "euler", **_k_timesteps(settings), **_end(settings)}


def dpm_multistep(settings: Settings) -> Config:
    """DPM-Solver and DPM-Solver++, multistep."""
    sampler = {**_dpm_sampler(settings), **_clipped(settings)}
    return {**sampler, **_open_timesteps(settings), **_end(settings)}


def _dpm_sampler(settings: Settings) -> Config:
    kind, order = settings["algorithm_type"], settings["solver_order"]
    ends = {name: settings[name] for name in ("lower_order_final", "euler_at_final")}
    options = {"solver_type": settings["solver_type"], **ends}
    table: dict[str, Config] = {
        "dpmsolver 1": {"sampler": "lms", "order": 1},
        "dpmsolver 2": {"sampler": "dpm_solver_2m", **options},
        "dpmsolver 3": {"sampler": "dpm_solver_3m", **options},
        "dpmsolver++ 1": {"sampler": "dpm_solver_pp_singlestep", "order": 1},
        "dpmsolver++ 2": {"sampler": "dpm_solver_pp_2m", **options},
        "dpmsolver++ 3": {"sampler": "dpm_solver_pp_3m_sde", "eta": 0.0, **options},
        "sde-dpmsolver++ 1": {"sampler": "dpm_solver_pp_singlestep", "order": 1, "eta": 1.0},
        "sde-dpmsolver++ 2": {"sampler": "dpm_solver_pp_2m_sde", **options},
    }
    # sde-dpmsolver++ of third order is absent: its last term has the wrong sign in diffusers.
    return lookup(table, f"{kind} {order}", "algorithm_type and solver_order")


def dpm_singlestep(settings: Settings) -> Config:
    """DPM-Solver++, singlestep, whose timesteps are always evenly spaced."""
    kind, order = settings["algorithm_type"], settings["solver_order"]
    noise = {"eta": 1.0} if kind == "sde-dpmsolver++" else {}
    if noise and order == 3 and settings["solver_type"] == "heun":
        raise ValueError("algorithm_type=sde-dpmsolver++ has no equal here with heun's third order")
    options = {"order": order, "solver_type": settings["solver_type"]}
    options["lower_order_final"] = settings["lower_order_final"]
    spaced = {**settings, "timestep_spacing": "linspace", "steps_offset": 0}
    sampler = {"sampler": "dpm_solver_pp_singlestep", **noise, **options}
    return {**sampler, **_clipped(settings), **_open_timesteps(spaced), **_end(settings)}


def unipc(settings: Settings) -> Config:
    """UniPC with predictions of z_0."""
    if settings["sigma_min"] is not None and settings["final_sigmas_type"] == "sigma_min":
        raise ValueError("sigma_min has no equal here with final_sigmas_type=sigma_min")
    options = {"order": settings["solver_order"], "solver_type": settings["solver_type"]}
    options["lower_order_final"] = settings["lower_order_final"]
    if settings["disable_corrector"]:
        options["disable_corrector"] = settings["disable_corrector"]
    sampler = {"sampler": "unipc", **options}
    return {**sampler, **_clipped(settings), **_open_timesteps(settings), **_end(settings)}


def deis(settings: Settings) -> Config:
    """DEIS, whose sampling ends at the least noise."""
    options = {
        "order": settings["solver_order"],
        "lower_order_final": settings["lower_order_final"],
    }
    return {
        "sampler": "deis",
        "last": 0,
        **options,
        **_clipped(settings),
        **_open_timesteps(settings),
    }


def distilled(sampler: str, **fixed: Any) -> Callable[[Settings], Config]:
    """The reader of a class for distilled networks."""

    def read(settings: Settings) -> Config:
        steps = {"spacing": "lcm", "distilled_steps": settings["original_inference_steps"]}
        return {"sampler": sampler, "num_steps": 4, **steps, **fixed, **_clipped(settings)}

    return read


def lcm(settings: Settings) -> Config:
    """Latent consistency models."""
    scaling = {"timestep_scaling": settings["timestep_scaling"]}
    return {**distilled("lcm")(settings), **scaling}


def edm_noise(settings: Settings) -> Config:
    """Karras' preconditioning; with sigma_data 1, the network's output is minus v."""
    kinds = {("epsilon", 0.5): ("edm", "edm"), ("epsilon", 1.0): ("edm_unit", "edm")}
    kinds["v_prediction", 1.0] = ("edm_unit", "v")
    kind = (settings["prediction_type"], settings["sigma_data"])
    if kind not in kinds:
        names = "; ".join(f"{prediction} {data}" for prediction, data in kinds)
        raise ValueError(f"prediction_type and sigma_data {kind} are unknown; known: {names}")
    schedule, prediction = kinds[kind]
    ends = {"beta_start": settings["sigma_min"], "beta_end": settings["sigma_max"]}
    return {"schedule": schedule, "prediction": prediction, **ends}


def _edm_timesteps(settings: Settings) -> Config:
    table = {name: {"spacing": name} for name in ("karras", "exponential")}
    steps = lookup(table, settings["sigma_schedule"], "sigma_schedule")
    rho = {"rho": settings["rho"]} if steps["spacing"] == "karras" else {}
    return {**steps, **rho, "within": "linspace"}


def edm_euler(settings: Settings) -> Config:
    """Euler's method for Karras' preconditioning."""
    return {"sampler": "euler", **_edm_timesteps(settings)}


def edm_dpm(settings: Settings) -> Config:
    """DPM-Solver++ for Karras' preconditioning."""
    return {**_dpm_sampler(settings), **_clipped(settings), **_edm_timesteps(settings)}
