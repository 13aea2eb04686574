"""Every option of a sampling call, beside its conditions.

`Model.sample`, the `sampling` fields of a config, the flags of `sample.py` and of `evaluate`, and
the table in docs/samplers.md are made of `SamplingOptions`; `process.plan` checks values by it.
"""
# ruff: noqa: RUF009 (the functions that make fields return fields)

import dataclasses
from collections.abc import Mapping
from typing import Any

from latent_diffusion.options import option, options_of


def _choice(default: Any, kind: type, help: str, **fields: Any) -> Any:
    return option(default, kind, help, **fields)


def _number(default: Any, range: str, help: str, **fields: Any) -> Any:
    return option(default, float, help, traced=True, range=range, **fields)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Numbers are inputs of the compiled program, choices are part of it.

    None stands for the default of the sampler or of the spacing, or for nothing where they have
    none. `process.plan` also turns numbers that ask for nothing into None, so that a program
    without guidance, say, doesn't compute it.
    """

    sampler: Any = _choice(
        "ddim", str, "how steps are taken: ddim, euler, heun, dpm_solver_pp_2m, unipc and others"
    )
    num_steps: Any = _choice(50, int, "steps, at most as many as the schedule has timesteps")
    spacing: Any = _choice(
        "trailing", str, "where steps lie: trailing, leading, karras, original and others"
    )
    end: Any = _choice(None, int, "where sampling ends: -1 is clean data, 0 the least noise")
    offset: Any = _choice(None, int, "added to the timesteps of leading and open_leading")
    rho: Any = _choice(None, float, "exponent of the karras spacing", range="(0, inf)")
    distilled_steps: Any = _choice(None, int, "steps that an lcm was made of", range="[1, inf)")
    timesteps: Any = _choice(
        None, float, "the timesteps of the given spacing", count=None, range="[0, inf)"
    )
    guidance_scale: Any = _number(
        1.0,
        "",
        "strength of classifier-free guidance, or one strength for each step; 1 is off",
        count=None,
        off=1.0,
    )
    guidance_interval: Any = _number(
        None, "[0, inf)", "low,high: timesteps (not shares of them) that are guided", count=2
    )
    guidance_rescale: Any = _number(
        0.0, "[0, 1]", "how far guided predictions get back their spread", off=0.0
    )
    cfg_pp: Any = _choice(False, bool, "CFG++: guidance_scale lies in [0, 1]")
    perpendicular: Any = _number(
        0.0,
        "",
        "weight of the part of negative_prompts that isn't parallel to the prompt; 0 is off",
        off=0.0,
        needs="negative_prompts",
    )
    clip_x0: Any = _number(0.0, "[0, inf)", "bound of estimates of z_0; 0 is off", off=0.0)
    dynamic_threshold: Any = _number(
        0.0, "(0, 1]", "quantile that clips estimates of z_0, e.g. 0.995; 0 is off", off=0.0
    )
    quantize_x0: Any = _choice(False, bool, "estimates of z_0 become their closest codes")
    strength: Any = _number(
        1.0, "[0, 1]", "share of the steps, which change image", off=1.0, needs="image"
    )
    eta: Any = _number(
        None, "[0, inf)", "share of fresh noise, of ddim and the ancestral and SDE samplers"
    )
    temperature: Any = _number(None, "[0, inf)", "factor of the noise of ddim and ddpm")
    noise_dropout: Any = _number(None, "[0, 1)", "share of ddim's noise that is dropped", off=0.0)
    large_variance: Any = _number(
        None, "[0, 1]", "ddpm's variance between the posterior's (0) and beta (1)"
    )
    timestep_scaling: Any = _number(None, "(0, inf)", "of an lcm's boundary condition")
    sigma_data: Any = _number(None, "(0, inf)", "of an lcm's boundary condition")
    order: Any = _choice(None, int, "order of lms, deis and unipc", range="[1, 4]")
    solver_type: Any = _choice(None, str, "midpoint or heun, of multistep DPM-Solver++")
    classifier_scale: Any = _number(
        1.0,
        "",
        "strength of a classifier's gradient; 1 is Bayes' rule",
        needs="classifier",
        flag=False,
    )
    target_scale: Any = _number(
        1.0,
        "",
        "strength of a target picture's gradient; 1 is Bayes' rule",
        needs="target",
        flag=False,
    )
    target_distance: Any = _choice(
        "l2", str, "l2 or lpips: distance to target", needs="target", flag=False
    )
    tile_size: Any = _choice(
        None, int, "pixels: large pictures are made in overlapping tiles", range="[1, inf)"
    )
    tile_overlap: Any = _choice(
        None, int, "pixels that tiles share; else a quarter", range="[0, inf)", needs="tile_size"
    )
    progress: Any = _choice(
        None, object, "`progress(t)` is called before each evaluation of the network", flag=False
    )
    preview: Any = _choice(
        None, object, "`preview(t, z_0)` is called with each estimate of z_0", flag=False
    )


OPTIONS = options_of(SamplingOptions)


def check_needs(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an option without the argument that gives it a meaning."""
    for name, made in OPTIONS.items():
        if made.needs and given.get(name) is not None and given.get(made.needs) is None:
            raise ValueError(f"{name} needs {made.needs}: give both")
