"""Plans a sampling call: checks its options and computes its timesteps."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Config, lookup
from latent_diffusion.process.options import (
    OPTIONS,
    PRIOR_OPTIONS,
    Option,
    PriorOptions,
    SamplingOptions,
)
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps
from latent_diffusion.process.spacings import SPACINGS, spacing

# Options that belong to the default sampler of a diffusers folder, as its scheduler has them.
OF_SCHEDULERS = ("network_timesteps", "spread")
# CFG++ changes z_0 but not eps, so it is for samplers whose step combines both.
CFG_PP_SAMPLERS = ("ddim", "euler", "euler_ancestral")

for cls, table in ((SamplingOptions, OPTIONS), (PriorOptions, PRIOR_OPTIONS)):
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[name for name, option in table.items() if option.traced],
        meta_fields=[name for name, option in table.items() if not option.traced],
    )


def options_of_sampler(name: str) -> dict[str, Any]:
    """The defaults of a sampler's options, by name."""
    return _keywords(lookup(SAMPLERS, name, "sampler").table)


def options_of_spacing(name: str) -> dict[str, Any]:
    """The defaults of a spacing's options, by name; all of them have a last timestep."""
    return {"last": None, **_keywords(lookup(SPACINGS, name, "spacing"), skip=3)}


def _keywords(function: Callable[..., Any], skip: int = 2) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    return {parameter.name: parameter.default for parameter in parameters}


SHARED = OPTIONS.keys() - {
    *(name for sampler in SAMPLERS for name in options_of_sampler(sampler)),
    *(name for kind in SPACINGS for name in options_of_spacing(kind)),
}


def plan(
    schedule: NoiseSchedule, prediction: str, defaults: Config, given: Mapping[str, Any]
) -> tuple[Timesteps, SamplingOptions]:
    """The timesteps of a sampling call and its options: `given` overrides a model's `defaults`.

    None stands for an option that isn't set. If `given` replaces the default sampler or spacing,
    the defaults of its options don't count. Of the timesteps, `strength` leaves the last ones.
    Numbers become arrays, or None where they have no effect; options that only determine the
    timesteps become None. Raises ValueError for an option that neither sampling, nor the sampler,
    nor the spacing has, and for a value that is out of its range or doesn't fit the others.
    """
    values = _values(defaults, given)
    options = SamplingOptions(**values)
    of_spacing = options_of_spacing(options.spacing)
    chosen = {name: values[name] for name in of_spacing if name in values}
    with jax.ensure_compile_time_eval():  # a task plans while it is traced
        timesteps = np.asarray(spacing(options.spacing, schedule, options.num_steps, **chosen))
    _check_guidance(options, timesteps, schedule)
    if options.learned_variance and options.large_variance:
        raise ValueError("give large_variance or learned_variance, not both")
    timesteps, options = _between(*_last_share(timesteps, options), schedule.num_timesteps)
    _check_start(timesteps, schedule, prediction)
    traced = [name for name, option in OPTIONS.items() if option.traced]
    numbers = {name: _number(name, getattr(options, name)) for name in traced}
    in_timesteps = dict.fromkeys(["spacing", "num_steps", *of_spacing])
    return jnp.asarray(timesteps), dataclasses.replace(options, **numbers, **in_timesteps)


def prior_options(causal: bool) -> dict[str, Option]:
    """The options of a causal or of a masked prior, by name."""
    masked_only = ("num_steps", "choice_temperature") if causal else ()
    return {name: option for name, option in PRIOR_OPTIONS.items() if name not in masked_only}


def plan_prior(defaults: Config, given: Mapping[str, Any], causal: bool) -> PriorOptions:
    """The checked options of a prior: `given` overrides the model's `defaults`.

    Numbers are as in `plan`. Raises ValueError for an option that this kind of prior doesn't have.
    """
    given = {name: value for name, value in given.items() if value is not None}
    allowed = prior_options(causal)
    for name in (*given, *(name for name in defaults if name not in PRIOR_OPTIONS)):
        if name not in allowed:
            kind = "causal" if causal else "masked"
            raise ValueError(
                f"unknown option {name!r} for a {kind} prior; known: {', '.join(sorted(allowed))}"
            )
    values = {name: option.default for name, option in PRIOR_OPTIONS.items()}
    values |= {name: value for name, value in defaults.items() if name in PRIOR_OPTIONS}
    checked = {k: PRIOR_OPTIONS[k].checked(k, v) for k, v in {**values, **given}.items()}
    return PriorOptions(
        **{
            name: _number(name, value, PRIOR_OPTIONS) if PRIOR_OPTIONS[name].traced else value
            for name, value in checked.items()
        }
    )


def own_options(options: SamplingOptions) -> dict[str, Any]:
    """The options of the sampler, as keyword arguments of its `table`."""
    values = {name: getattr(options, name) for name in options_of_sampler(options.sampler)}
    if options.end is not None:  # the order may fall only in the last step, of another call
        values |= {name: False for name in values.keys() & {"lower_order_final", "euler_at_final"}}
    return {name: value for name, value in values.items() if value is not None}


def _values(defaults: Config, requested: Mapping[str, Any]) -> dict[str, Any]:
    """All options that are set, checked, by name, and the numbers of the sampler in any case."""
    requested = {name: value for name, value in requested.items() if value is not None}
    usual = {"sampler": SamplingOptions.sampler, "spacing": SamplingOptions.spacing}
    defaults = {**usual, **{k: value for k, value in defaults.items() if value is not None}}
    parts: list[tuple[str, Any, Callable[[str], dict[str, Any]], tuple[str, ...]]] = [
        ("sampler", SAMPLERS, options_of_sampler, OF_SCHEDULERS),
        ("spacing", SPACINGS, options_of_spacing, ()),
    ]
    for part, table, options_of, more in parts:
        default = defaults[part]
        if requested.get(part, default) != default:  # files may name samplers that are missing here
            replaced = {*more, *(options_of(default) if default in table else ())}
            defaults = {k: value for k, value in defaults.items() if k not in replaced}
    values = {**defaults, **requested}
    sampler, name = (OPTIONS[part].checked(part, values[part]) for part in usual)
    of_sampler = options_of_sampler(sampler)
    allowed = SHARED | {*of_sampler, *options_of_spacing(name)}
    for option in values:
        if option not in allowed:
            raise ValueError(
                f"unknown option {option!r} for sampler {sampler!r} with spacing {name!r}; "
                f"known: {', '.join(sorted(allowed))}"
            )
    numbers = {name: value for name, value in of_sampler.items() if OPTIONS[name].traced}
    return {name: OPTIONS[name].checked(name, v) for name, v in {**numbers, **values}.items()}


def _number(name: str, value: Any, table: Mapping[str, Option] = OPTIONS) -> Any:
    """The value as an input of a program; None if it has no effect."""
    return None if value is None or value == table[name].off else np.asarray(value, np.float32)


def _check_guidance(
    options: SamplingOptions, timesteps: np.ndarray, schedule: NoiseSchedule
) -> None:
    scales = np.atleast_1d(options.guidance_scale)
    if isinstance(options.guidance_scale, tuple) and len(scales) != len(timesteps) - 1:
        raise ValueError(f"{len(scales)} guidance scales for {len(timesteps) - 1} steps")
    if options.cfg_pp:
        if options.sampler not in CFG_PP_SAMPLERS:
            samplers = ", ".join(CFG_PP_SAMPLERS)
            raise ValueError(f"cfg_pp works with {samplers}, not {options.sampler}")
        if wrong := [scale for scale in scales if not 0 <= scale <= 1]:
            raise ValueError(f"the guidance scale of CFG++ must lie in [0, 1], got {wrong[0]:g}")
    if options.guidance_interval is not None:
        low, high = options.guidance_interval
        if low > high or high <= 1 < schedule.num_timesteps - 1:  # probably shares of the noise
            raise ValueError(
                "guidance_interval must be (low, high), timesteps of 0 … "
                f"{schedule.num_timesteps - 1} and no shares of them, got ({low:g}, {high:g})"
            )


def _last_share(
    timesteps: np.ndarray, options: SamplingOptions
) -> tuple[np.ndarray, SamplingOptions]:
    """The last timesteps, and options with the last guidance scales, as `strength` chooses.

    Of `strength` the options then say only whether it has an effect.
    """
    total, strength = len(timesteps) - 1, options.strength
    skipped = 0 if strength is None else total - int(strength * total + 1e-6)
    if isinstance(options.guidance_scale, tuple):
        options = dataclasses.replace(options, guidance_scale=options.guidance_scale[skipped:])
    # Another share with as many steps is the same program.
    changes = None if strength in (None, OPTIONS["strength"].off) else True
    return timesteps[skipped:], dataclasses.replace(options, strength=changes)


def _between(
    timesteps: np.ndarray, options: SamplingOptions, total: int
) -> tuple[np.ndarray, SamplingOptions]:
    """The timesteps between `start` and `end`, as in diffusers, and options with their scales.

    The network is evaluated at timesteps below `start` · T that aren't below `end` · T; the result
    then has the noise of the first timestep below `end` · T.
    """
    start, end = options.start, options.end
    if start == OPTIONS["start"].off and end == OPTIONS["end"].off:
        return timesteps, dataclasses.replace(options, start=None, end=None)
    if options.strength is not None:
        raise ValueError("give strength, or start and end: both choose the steps")
    if end != OPTIONS["end"].off and options.sampler in ("lcm", "tcd"):
        raise ValueError(
            f"sampler {options.sampler!r} ends without noise, so it can't stop at end={end:g}"
        )
    evaluated = timesteps[:-1]
    first = 0 if start == OPTIONS["start"].off else int(np.sum(evaluated >= round(start * total)))
    count = int(np.sum(evaluated >= round(end * total)))
    if first >= count:
        raise ValueError(f"no step lies between start={start:g} and end={end:g}: take more steps")
    if isinstance(options.guidance_scale, tuple):
        scales = options.guidance_scale[first:count]
        options = dataclasses.replace(options, guidance_scale=scales)
    bounds = [x if x != OPTIONS[name].off else None for name, x in (("start", start), ("end", end))]
    options = dataclasses.replace(options, start=bounds[0], end=bounds[1])
    return timesteps[first : count + 1], options


def _check_start(timesteps: np.ndarray, schedule: NoiseSchedule, prediction: str) -> None:
    first = float(timesteps[0])
    alphas = np.asarray(schedule.alphas)
    if prediction == "eps" and first >= 0 and first.is_integer() and alphas[int(first)] == 0:
        raise ValueError(
            f"timestep {first:g} is noise alone (zero terminal SNR), from which a network that "
            "predicts eps can't tell an image; a spacing such as 'leading' starts below it"
        )
