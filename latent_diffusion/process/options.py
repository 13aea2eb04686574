"""Every option of a sampling call except its conditions: default, type, range, effect and help.

`Model.sample`, the `sampling` fields of a config, the flags of `sample.py` and of `evaluate`, and
the table in docs/samplers.md are made from `SamplingOptions`; `process.plan` checks values by it.
This module needs nothing but Python, so that a command can quickly explain its flags.
"""
# ruff: noqa: RUF009 (the functions that make fields return fields)

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    kind: the type of a value, or of each of several values; `object` for a function. count: how
    many values there are; None means one, or a list of any length. traced: whether a compiled
    program takes the value as an input, so that another value runs the same program. range: allowed
    numbers, such as "(0, 1]". off: the value that has no effect. needs: the argument without which
    the option has no meaning. flag: whether commands have a flag for it.
    """

    default: Any
    kind: type
    help: str
    count: int | None = 1
    traced: bool = False
    range: str = ""
    off: float | None = None
    needs: str = ""
    flag: bool = True

    def checked(self, name: str, value: Any) -> Any:
        """The value with the option's type; ValueError for a wrong type, number or length."""
        value = _plain(value)
        if self.count == 1 or (self.count is None and isinstance(value, numbers.Real)):
            return self._checked_entry(name, value)
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise ValueError(f"{name}={value!r} must be a list of numbers")
        values = tuple(self._checked_entry(name, entry) for entry in value)
        if len(values) != (self.count or max(len(values), 1)):
            raise ValueError(f"{name} has {len(values)} values, expected {self.count or 'some'}")
        return values

    def _checked_entry(self, name: str, value: Any) -> Any:
        wanted: dict[type, tuple[Any, str]] = {
            bool: (bool, "true or false"),
            int: (numbers.Integral, "an integer"),
            float: (numbers.Real, "a number"),
            str: (str, "a text"),
            object: (object, "a function"),
        }
        value = _plain(value)
        allowed, words = wanted[self.kind]
        if not isinstance(value, allowed) or isinstance(value, bool) != (self.kind is bool):
            raise ValueError(f"{name}={value!r} must be {words}")
        if self.kind not in (int, float):
            return value
        value = self.kind(value)
        if value != self.off and not in_range(value, self.range):
            raise ValueError(f"{name} must lie in {self.range or 'the reals'}, got {value:g}")
        return value


def _plain(value: Any) -> Any:
    """The value; a scalar of NumPy or JAX as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def in_range(value: float | int, range: str) -> bool:
    """Whether a finite number lies in a range such as "[0, 1)"; an empty range has no bounds."""
    if not math.isfinite(value):
        return False
    if not range:
        return True
    low, high = (float(bound) for bound in range[1:-1].split(","))
    above = low <= value if range[0] == "[" else low < value
    return above and (value <= high if range[-1] == "]" else value < high)


def check_ranges(config: Any, ranges: Mapping[str, str]) -> None:
    """Raise ValueError for a field of a config, named "section.field", outside its range.

    A field may hold several numbers; one that the config lacks (of an older version) passes.
    """
    for path, allowed in ranges.items():
        section, _, name = path.partition(".")
        value = config[section].get(name)
        values = value if isinstance(value, tuple | list) else [value]
        if value is not None and not all(in_range(number, allowed) for number in values):
            raise ValueError(f"{path}={value} must lie in {allowed}")


def _choice(default: Any, kind: type, help: str, **fields: Any) -> Any:
    """A field of a dataclass of options; `fields` are further fields of `Option`."""
    made = Option(default, kind, help, **fields)
    return dataclasses.field(default=default, metadata={"option": made})


def options_of(cls: Any) -> dict[str, Option]:
    """The options of a dataclass, by name."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}


def markdown(cls: Any) -> str:
    """The options of a dataclass as a table."""
    rows = ["| option | default | allowed | another value | meaning |", "|---|---|---|---|---|"]
    words = {bool: "true, false", int: "integer", float: "number", str: "name", object: "function"}
    for name, made in options_of(cls).items():
        default = "–" if made.default is None else f"`{made.default}`"
        allowed = made.range or words[made.kind]
        effect = "same program" if made.traced else "compiles"
        effect = "three programs" if made.kind is object else effect
        rows.append(f"| `{name}` | {default} | {allowed} | {effect} | {made.help} |")
    return "\n".join(rows) + "\n"


def _number(default: Any, range: str, help: str, **fields: Any) -> Any:
    return _choice(default, float, help, traced=True, range=range, **fields)


# A test compares these names with the tables, whose modules need JAX.
SAMPLER_NAMES = (
    "ddpm, ddim, plms, euler, euler_ancestral, heun, dpm2, dpm2_ancestral, ipndm, lms, "
    "dpm_solver_2m, dpm_solver_3m, dpm_solver_pp_2s_ancestral, dpm_solver_pp_sde, "
    "dpm_solver_pp_2m, dpm_solver_pp_2m_sde, dpm_solver_pp_3m_sde, dpm_solver_pp_singlestep, "
    "unipc, deis, lcm, tcd"
)
SPACING_NAMES = (
    "original, original_quad, uniform, linspace, open, leading, open_leading, trailing, quad, "
    "karras, exponential, beta, given, ays, lcm, shifted"
)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Numbers are inputs of the compiled program, choices are part of it.

    None stands for the default of the sampler or of the spacing, if it has the option.
    `process.plan` also turns numbers without effect into None, so that a program without guidance,
    for example, doesn't compute guidance.
    """

    sampler: Any = _choice("ddim", str, f"how steps are taken: {SAMPLER_NAMES}")
    num_steps: Any = _choice(50, int, "steps, at most as many as the schedule has timesteps")
    spacing: Any = _choice("trailing", str, f"where steps lie: {SPACING_NAMES}")
    last: Any = _choice(None, int, "the last timestep: -1 is clean data, 0 the least noise")
    offset: Any = _choice(None, int, "added to the timesteps of leading and open_leading")
    rho: Any = _choice(None, float, "exponent of the karras spacing", range="(0, inf)")
    within: Any = _choice(
        None, str, "spacing whose first and last steps are those of karras, exponential and beta"
    )
    sigma_min: Any = _choice(
        None, float, "least sigma/alpha of karras, exponential and beta", range="(0, inf)"
    )
    sigma_max: Any = _choice(
        None, float, "largest sigma/alpha of karras, exponential and beta", range="(0, inf)"
    )
    distilled_steps: Any = _choice(
        None, int, "steps of the solver from which an lcm was distilled", range="[1, inf)"
    )
    shift: Any = _choice(
        None,
        float,
        "strength of the shifted spacing: above 1, steps lie closer to noise",
        range="(0, inf)",
    )
    timesteps: Any = _choice(
        None, float, "the timesteps of the spacing given", count=None, range="[0, inf)"
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
        0.0, "[0, 1]", "how far guided predictions are rescaled to the condition's spread", off=0.0
    )
    guidance_channels: Any = _choice(
        None,
        int,
        "number of latent channels that are guided, from the first; DiT's code guides 3 of 4",
        range="[1, inf)",
    )
    cfg_pp: Any = _choice(False, bool, "CFG++: guidance_scale lies in [0, 1]")
    perpendicular: Any = _number(
        0.0,
        "",
        "weight of the part of negative_prompts that isn't parallel to the prompt; 0 is off",
        off=0.0,
        needs="negative_prompts",
    )
    network_timesteps: Any = _choice(
        None, str, "exact, round or floor: how the network's timesteps are rounded"
    )
    spread: Any = _choice(
        None, str, "unit or sigma: the spread of the start noise; sigma in k-diffusion"
    )
    start: Any = _choice(
        1.0,
        float,
        "share of the noise at which sampling starts, from the latents z_T there or from image",
        range="(0, 1]",
        off=1.0,
        flag=False,
    )
    end: Any = _choice(
        0.0,
        float,
        "share of the noise at which sampling stops; `sample` then returns the latents there",
        range="[0, 1)",
        off=0.0,
        flag=False,
    )
    clip_x0: Any = _number(0.0, "[0, inf)", "bound of estimates of z_0; 0 is off", off=0.0)
    dynamic_threshold: Any = _number(
        0.0, "(0, 1]", "quantile that clips estimates of z_0, e.g. 0.995; 0 is off", off=0.0
    )
    threshold_limit: Any = _number(
        None, "[1, inf)", "largest bound of dynamic_threshold", needs="dynamic_threshold"
    )
    quantize_x0: Any = _choice(False, bool, "estimates of z_0 become their closest codes")
    strength: Any = _choice(
        1.0,
        float,
        "share of the steps, counted from the end, that change image",
        range="[0, 1]",
        off=1.0,
        needs="image",
    )
    eta: Any = _number(
        None, "[0, inf)", "share of fresh noise in ddim, tcd and the ancestral and SDE samplers"
    )
    temperature: Any = _number(None, "[0, inf)", "factor of the noise of ddim, ddpm and priors")
    noise_dropout: Any = _number(None, "[0, 1)", "share of ddim's noise that is dropped", off=0.0)
    large_variance: Any = _number(
        None, "[0, 1]", "ddpm's variance between the posterior's (0) and beta (1)"
    )
    learned_variance: Any = _choice(
        None, bool, "whether ddpm's variance is the network's (dit.learned_variance)"
    )
    timestep_scaling: Any = _number(
        None, "(0, inf)", "factor of the timestep in lcm's boundary condition"
    )
    sigma_data: Any = _number(None, "(0, inf)", "spread of the data in lcm's boundary condition")
    order: Any = _choice(None, int, "order of lms, deis, unipc and singlestep", range="[1, 4]")
    solver_type: Any = _choice(
        None, str, "midpoint or heun, of DPM-Solver; bh1 or bh2, of unipc: the second-order step"
    )
    lower_order_final: Any = _choice(
        None, bool, "whether the order of multistep and singlestep methods falls in the last steps"
    )
    euler_at_final: Any = _choice(
        None, bool, "whether the last step of multistep DPM-Solver is of first order"
    )
    disable_corrector: Any = _choice(
        None,
        int,
        "steps of unipc, counted from 0, without correction",
        count=None,
        range="[0, inf)",
    )
    extrapolated: Any = _choice(None, str, "eps or v: the prediction that plms extrapolates")
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
        None,
        int,
        "pixels that neighbouring tiles share; by default a quarter",
        range="[0, inf)",
        needs="tile_size",
    )
    progress: Any = _choice(
        None,
        object,
        "`progress(t)` is called before each evaluation of the network; its attribute `total`, if "
        "it has one, becomes the number of calls",
        flag=False,
    )
    preview: Any = _choice(
        None, object, "`preview(t, z_0)` is called with each estimate of z_0", flag=False
    )


@dataclasses.dataclass(frozen=True)
class PriorOptions:
    """The options of a prior over codes, which has no sampler."""

    temperature: Any = _number(1.0, "[0, inf)", "of the draw; 0 takes the likeliest code", off=1.0)
    top_k: Any = _choice(
        0,
        int,
        "number of likeliest codes that a prior draws from; 0 is all",
        range="[1, inf)",
        off=0.0,
        traced=True,
    )
    top_p: Any = _number(
        1.0,
        "(0, 1]",
        "total probability of the likeliest codes, from which a prior draws; 1 is all",
        off=1.0,
    )
    guidance_scale: Any = _number(
        1.0, "", "strength of classifier-free guidance on logits; 1 is off", off=1.0
    )
    num_steps: Any = _choice(12, int, "steps of a masked prior", range="[1, inf)")
    choice_temperature: Any = _number(
        4.5, "[0, inf)", "noise in the order in which a masked prior settles codes"
    )


OPTIONS = options_of(SamplingOptions)
PRIOR_OPTIONS = options_of(PriorOptions)
ALL_OPTIONS = {**PRIOR_OPTIONS, **OPTIONS}  # for a shared name, the flag explains the denoiser's


def check_needs(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for a given option without what it needs, given or among the defaults."""
    present = {name for part in (given, defaults) for name, x in part.items() if x is not None}
    for name, made in OPTIONS.items():
        if made.needs and given.get(name) is not None and made.needs not in present:
            raise ValueError(f"{name} needs {made.needs}: give both")
