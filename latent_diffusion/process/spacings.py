"""Spacings: the timesteps at which a sampler visits a noise schedule.

A spacing takes the log-SNR table [T] (float64), S, and the final timestep, and returns the S
timesteps of the network in either order; `spacing` sorts and bounds them and appends the final
timestep.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special

from latent_diffusion.core.types import lookup
from latent_diffusion.process.schedules import CLEAN, NoiseSchedule, Timesteps


def _original_quad(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    # CompVis' "quad", with its repeated t = 1; S = 1 (where it would start at t = 1) starts high.
    top = np.sqrt(0.8 * len(log_snr))
    roots = np.linspace(0, top, num) if num > 1 else np.array([top])
    return np.floor(roots**2) + 1


def _ramp(first: Any, last: Any, num: int, end: int) -> np.ndarray:
    """S even steps down to `last`, which the network evaluates unless sampling ends there."""
    return np.linspace(first, last, num) if end < 0 else np.linspace(first, last, num + 1)[:-1]


def _quad(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    steps = np.round(_ramp(np.sqrt(len(log_snr) - 1), 0, num, end)[::-1] ** 2)
    return np.maximum(steps, np.arange(num) + end + 1)  # no timestep twice


def _curve(ramp: Callable[[float, float, int, int], np.ndarray]) -> Callable[..., np.ndarray]:
    """The spacing whose sigma/alpha are ramp(highest, lowest, S, end).

    `within` names a spacing (with its `offset`) whose first and last timesteps are the ends of the
    curve, and are both evaluated; without it the curve spans the whole schedule. `sigma_min` and
    `sigma_max` replace these ends.
    """

    def along(
        log_snr: np.ndarray,
        num: int,
        end: int,
        within: str | None = None,
        offset: int = 0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> np.ndarray:
        sigmas = np.exp(-0.5 * log_snr)
        high, low = sigmas[-1], sigmas[0]
        if within is not None:
            offsets = {"offset": offset} if within in ("leading", "open_leading") else {}
            ends = lookup(SPACINGS, within, "spacing")(log_snr, num, CLEAN, **offsets)
            ends = np.clip(np.round(ends), 0, len(sigmas) - 1).astype(int)
            high, low, end = sigmas[ends.max()], sigmas[ends.min()], CLEAN
        for name, sigma in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            # Files round the bounds of their schedule.
            if sigma is not None and not 0.999 * sigmas[0] <= sigma <= 1.001 * sigmas[-1]:
                raise ValueError(
                    f"{name} must lie in {sigmas[0]:g} … {sigmas[-1]:g}, the schedule's noise, "
                    f"got {sigma:g}"
                )
        steps = ramp(sigma_max or high, sigma_min or low, num, end)
        return _timesteps_at(log_snr, -2 * np.log(steps))

    return along


def _karras(
    log_snr: np.ndarray,
    num: int,
    end: int,
    rho: float = 7.0,
    within: str | None = None,
    offset: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> np.ndarray:
    """Even steps of (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""
    power = 1 / rho
    along = _curve(lambda high, low, *ramp: _ramp(high**power, low**power, *ramp) ** rho)
    return along(log_snr, num, end, within, offset, sigma_min, sigma_max)


def _exponential(high: float, low: float, num: int, end: int) -> np.ndarray:
    return np.exp(_ramp(np.log(high), np.log(low), num, end))


def _beta(high: float, low: float, num: int, end: int) -> np.ndarray:
    """Even quantiles of Beta(0.6, 0.6), which is dense at both ends (Lee et al. 2024)."""
    return low + (high - low) * scipy.special.betaincinv(0.6, 0.6, _ramp(1.0, 0.0, num, end))


def _listed(
    log_snr: np.ndarray,
    num: int,
    end: int,
    timesteps: Sequence[float | int] | float | int | None = None,
) -> np.ndarray:
    """The timesteps of a list; if it has another length than S, its log-SNR is interpolated.

    Sabour et al. 2024, section 4.
    """
    if timesteps is None:
        raise ValueError("the spacing 'given' needs timesteps, a list of them")
    listed = np.sort(np.atleast_1d(np.asarray(timesteps, np.float64)))[::-1]
    if not (listed[0] <= len(log_snr) - 1 and listed[-1] >= 0):
        raise ValueError(f"given timesteps must lie in 0 … {len(log_snr) - 1}, got {timesteps}")
    if len(listed) == num:
        return listed
    values = np.interp(listed, np.arange(len(log_snr)), log_snr)
    log_snrs = np.interp(np.linspace(0, 1, num), np.linspace(0, 1, len(listed)), values)
    return _timesteps_at(log_snr, log_snrs)


def _lcm(log_snr: np.ndarray, num: int, end: int, distilled_steps: int = 50) -> np.ndarray:
    """S of the timesteps of the solver that was distilled (Luo et al. 2023)."""
    if num > distilled_steps:
        raise ValueError(f"num_steps must lie in 1 … {distilled_steps} (distilled), got {num}")
    trained = distilled_timesteps(len(log_snr), distilled_steps)
    return trained[::-1][np.arange(num) * distilled_steps // num]


def distilled_timesteps(num_timesteps: int, distilled_steps: int) -> np.ndarray:
    """The timesteps [N], ascending, of the solver along which a model is distilled.

    Raises ValueError for more steps than timesteps.
    """
    if not 1 <= distilled_steps <= num_timesteps:
        raise ValueError(f"distilled_steps={distilled_steps} must lie in 1 … {num_timesteps}")
    return (np.arange(distilled_steps) + 1) * (num_timesteps // distilled_steps) - 1


def shifted(share: Any, shift: Any) -> Any:
    """Shares of noise, moved towards noise (shift above 1) or data (Esser et al. 2024, eq. 23)."""
    return shift * share / (1 + (shift - 1) * share)


def _shifted(log_snr: np.ndarray, num: int, end: int, shift: float = 1.0) -> np.ndarray:
    """Even shares of a flow's noise, shifted, as for Stable Diffusion 3.

    As in diffusers, the least share is shifted twice.
    """
    total = len(log_snr)
    even = np.linspace(1, shifted(1 / total, shift), num)
    return total * shifted(even, shift) - 1


def _timesteps_at(log_snr: np.ndarray, log_snrs: np.ndarray) -> np.ndarray:
    return np.interp(-log_snrs, -log_snr, np.arange(len(log_snr)))


_AYS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)  # Stable Diffusion 1 (Sabour et al.)
SPACINGS: dict[str, Callable[..., np.ndarray]] = {
    # CompVis' range(0, T, T // S) + 1 if S divides T; S timesteps also for any other S.
    "original": lambda x, num, end: np.arange(num) * len(x) // num + 1,
    "original_quad": _original_quad,
    "uniform": lambda x, num, end: np.round(_ramp(len(x) - 1, 0, num, end)),
    "linspace": lambda x, num, end: np.linspace(len(x) - 1, 0, num),  # includes 0 for every end
    # DPM-Solver's "open" spacings don't evaluate t = 0 even if sampling ends at clean data.
    "open": lambda x, num, end: np.round(_ramp(len(x) - 1, 0, num, 0)),
    "leading": lambda x, num, end, offset=0: np.arange(num) * (len(x) // num) + offset,
    "open_leading": lambda x, num, end, offset=0: (
        (np.arange(num) + 1) * (len(x) // (num + 1)) + offset
    ),
    "trailing": lambda x, num, end: np.round(len(x) - np.arange(num) * (len(x) / num)) - 1,
    "quad": _quad,
    "karras": _karras,
    "exponential": _curve(_exponential),
    "beta": _curve(_beta),
    "given": _listed,
    "ays": lambda x, num, end: _listed(x, num, end, _AYS),  # "Align your steps"
    "lcm": _lcm,
    "shifted": _shifted,
}


def spacing(
    name: str, schedule: NoiseSchedule, num_steps: int, *, last: int | None = None, **options: Any
) -> Timesteps:
    """Timesteps [S+1], descending: the S at which the network is evaluated, then the final one.

    last: the final timestep: −1 (clean data) or 0 (the noise of ᾱ_0, where the original LDM stops);
    None is 0 for the "original" spacings and −1 for the others. options: those of the spacing:
    `offset` (leading, open_leading), `rho` (karras), `distilled_steps` (lcm), `shift` (shifted),
    `timesteps` (given: a list, whose log-SNR is interpolated if its length is not num_steps), and
    for karras, exponential and beta `within`, `offset`, `sigma_min` and `sigma_max` (see `_curve`).
    The result is int32 if every timestep is an integer, else float32. It is computed on the
    host, not under jit. Raises ValueError for an unknown name or num_steps outside 1 … T.
    """
    total = schedule.num_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in 1 … {total} (the schedule's T), got {num_steps}")
    if last not in (None, CLEAN, 0):
        raise ValueError(f"last must be -1 (clean data) or 0 (the noise of alpha_0), got {last}")
    end = last
    if end is None:
        end = 0 if name.startswith("original") else CLEAN
    log_snr = np.asarray(schedule.log_snr, np.float64)
    steps = lookup(SPACINGS, name, "spacing")(log_snr, num_steps, end, **options)
    steps = np.sort(np.clip(steps, 0, total - 1))[::-1]
    steps = np.append(steps, end)
    integral = bool(np.all(steps == np.round(steps)))
    return jnp.asarray(steps, jnp.int32 if integral else jnp.float32)
