"""Noise schedules, and the timesteps at which a sampler visits them.

A noised latent is z_t = alpha_t z_0 + sigma_t eps. `make_schedule` tabulates alpha and sigma for
t = 0 … T−1 (float64 on the host, stored float32); t = −1 is clean data. `spacing` chooses the S
timesteps at which the network is evaluated and the one at which sampling ends.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.types import Array, Float, Int, lookup

__all__ = [
    "BETAS",
    "CLEAN",
    "SPACINGS",
    "NoiseSchedule",
    "Timestep",
    "Timesteps",
    "make_schedule",
    "spacing",
]

Timestep = Int[Array, "..."] | Float[Array, "..."] | int | float
Timesteps = Int[Array, " S_and_end"] | Float[Array, " S_and_end"]  # [S+1]

CLEAN = -1  # the timestep of noise-free data: alpha 1, sigma 0


@flax.struct.dataclass
class NoiseSchedule:
    """Tables over t = 0 … T−1 of z_t = alpha_t z_0 + sigma_t eps.

    Every method takes integer or float timesteps of any shape. −1 (any negative t) is clean data;
    a fractional t interpolates log(sigma/alpha) linearly, as k-diffusion does; t beyond T−1 is T−1.
    """

    betas: Float[Array, " T"]  # 1 − ᾱ_t / ᾱ_{t−1}
    alphas_cumprod: Float[Array, " T"]  # ᾱ = alpha² / (alpha² + sigma²)
    alphas: Float[Array, " T"]
    sigmas: Float[Array, " T"]
    log_snr: Float[Array, " T"]  # log(alpha² / sigma²), finite also where alpha is 0

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alphas_cumprod.shape[0]

    def alpha_t(self, t: Timestep) -> Float[Array, "..."]:
        """Signal amplitude, same shape as t."""
        return jnp.where(jnp.asarray(t) < 0, 1.0, self._at(t, self.alphas, jax.nn.sigmoid))

    def sigma_t(self, t: Timestep) -> Float[Array, "..."]:
        """Noise amplitude, same shape as t."""
        return jnp.where(
            jnp.asarray(t) < 0, 0.0, self._at(t, self.sigmas, lambda x: jax.nn.sigmoid(-x))
        )

    def log_snr_t(self, t: Timestep) -> Float[Array, "..."]:
        """log(alpha²/sigma²), same shape as t; +inf at −1."""
        low, weight = self._locate(t)
        step = self.log_snr[jnp.minimum(low + 1, self.num_timesteps - 1)] - self.log_snr[low]
        return jnp.where(jnp.asarray(t) < 0, jnp.inf, self.log_snr[low] + weight * step)

    def timestep_at(self, log_snr: Float[Array, "..."]) -> Float[Array, "..."]:
        """The fractional timestep in [0, T−1] of a log-SNR (inverse of `log_snr_t`)."""
        steps = jnp.arange(self.num_timesteps, dtype=self.log_snr.dtype)
        return jnp.interp(-log_snr, -self.log_snr, steps)

    def _locate(self, t: Timestep) -> tuple[Array, Array]:
        t = jnp.clip(jnp.asarray(t), 0, self.num_timesteps - 1)
        low = jnp.floor(t).astype(jnp.int32)
        return low, (t - low).astype(self.log_snr.dtype)

    def _at(self, t: Timestep, table: Array, share: Callable[[Array], Array]) -> Array:
        """table[t]; between entries from the interpolated log-SNR (share: log-SNR -> energy)."""
        low, weight = self._locate(t)
        scale = jnp.hypot(self.alphas, self.sigmas)  # 1 for variance-preserving schedules
        high = jnp.minimum(low + 1, self.num_timesteps - 1)
        between = (scale[low] + weight * (scale[high] - scale[low])) * jnp.sqrt(
            share(self.log_snr_t(t))
        )
        return jnp.where(weight == 0, table[low], between)


def _linear(num: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    # "linear" is the field's name for the square of a line (scaled-linear in diffusers).
    return np.linspace(start**0.5, end**0.5, num) ** 2


def _sqrt_linear(num: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start, end, num)  # the line of Ho et al. 2020, under CompVis' name


def _sqrt(num: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start, end, num) ** 0.5


def _cosine(num: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    # Nichol & Dhariwal 2021, eq. 17; start and end play no role.
    tau = (np.arange(num + 1) / num + cosine_s) / (1 + cosine_s)
    alpha_bar = np.cos(np.pi / 2 * tau) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


BETAS = {"linear": _linear, "sqrt_linear": _sqrt_linear, "sqrt": _sqrt, "cosine": _cosine}


def make_schedule(
    name: str = "linear",
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    cosine_s: float = 0.008,
    betas: Sequence[float] | np.ndarray | None = None,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Tabulate a noise schedule.

    name: a curve of `BETAS`, or "rectified_flow": alpha = 1 − (t+1)/T, sigma = (t+1)/T, which
    ignores the betas (Liu et al. 2022). betas: given values, which take precedence over `name`.
    zero_terminal_snr: shift and stretch √ᾱ so that ᾱ_{T−1} = 0 (Lin et al. 2023, algorithm 1);
    needs an x0, v or flow network, since eps tells nothing about z_0 there.
    """
    if betas is None and name == "rectified_flow":
        sigmas = np.arange(1, num_timesteps + 1) / num_timesteps
        return _tabulate(1 - sigmas, sigmas)
    if betas is None:
        curve = lookup({**BETAS, "rectified_flow": None}, name, "noise schedule")
        betas = curve(num_timesteps, beta_start, beta_end, cosine_s)
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    if zero_terminal_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return _tabulate(root, np.sqrt(1 - root**2))


def _tabulate(alphas: np.ndarray, sigmas: np.ndarray) -> NoiseSchedule:
    alpha_bar = alphas**2 / (alphas**2 + sigmas**2)
    # Where alpha is 0 (zero terminal SNR), log-SNR stays finite: just below its predecessor's.
    bounded = np.where(alpha_bar > 0, alpha_bar, min(2.0**-24, alpha_bar[-2] / 2))
    log_snr = np.log(bounded) - np.log1p(-bounded)
    betas = 1 - bounded / np.append(1.0, bounded[:-1])
    tables = (betas, alpha_bar, alphas, sigmas, log_snr)
    return NoiseSchedule(*(jnp.asarray(table, jnp.float32) for table in tables))


# ------------------------------------------------------------------------------------ spacings
# Each takes the log-SNR table [T] (float64), S, and where sampling ends, and returns the S
# evaluation timesteps in either order; `spacing` sorts and bounds them and appends the end.


def _original(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    # CompVis: range(0, T, T // S) + 1. floor(iT/S) equals it where S divides T; always S of them.
    return np.arange(num) * len(log_snr) // num + 1


def _original_quad(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    # CompVis' "quad", with its repeated t = 1; S = 1 (where it would start at t = 1) starts high.
    top = np.sqrt(0.8 * len(log_snr))
    roots = np.linspace(0, top, num) if num > 1 else np.array([top])
    return np.floor(roots**2) + 1


def _ramp(first: Any, last: Any, num: int, end: int) -> np.ndarray:
    """S even steps down to `last`: it is evaluated too, except where sampling ends there."""
    return np.linspace(first, last, num) if end < 0 else np.linspace(first, last, num + 1)[:-1]


def _uniform(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    return np.round(_linspace(log_snr, num, end))


def _linspace(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    return _ramp(len(log_snr) - 1, 0, num, end)


def _open(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    # t = 0 isn't evaluated even where sampling goes on from it to clean data (DPM-Solver's).
    return np.round(_ramp(len(log_snr) - 1, 0, num, 0))


def _leading(log_snr: np.ndarray, num: int, end: int, offset: int = 0) -> np.ndarray:
    return np.arange(num) * (len(log_snr) // num) + offset


def _open_leading(log_snr: np.ndarray, num: int, end: int, offset: int = 0) -> np.ndarray:
    # Without t = 0, like "open".
    return (np.arange(num) + 1) * (len(log_snr) // (num + 1)) + offset


def _trailing(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    total = len(log_snr)
    return np.round(total - np.arange(num) * (total / num)) - 1


def _quad(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    steps = np.round(_ramp(np.sqrt(len(log_snr) - 1), 0, num, end)[::-1] ** 2)
    return np.maximum(steps, np.arange(num) + end + 1)  # no timestep twice


def _karras(log_snr: np.ndarray, num: int, end: int, rho: float = 7.0) -> np.ndarray:
    # Karras et al. 2022, eq. 5, in sigma/alpha.
    sigmas = np.exp(-0.5 * log_snr)
    ramp = _ramp(sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho), num, end)
    return _timesteps_at(log_snr, -2 * rho * np.log(ramp))


def _exponential(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    return _timesteps_at(log_snr, _ramp(log_snr[-1], log_snr[0], num, end))


def _given(log_snr: np.ndarray, num: int, end: int, timesteps: Sequence[float | int]) -> np.ndarray:
    given = np.sort(np.asarray(timesteps, np.float64))[::-1]
    if not (given[0] <= len(log_snr) - 1 and given[-1] >= 0):
        raise ValueError(f"given timesteps must lie in 0 … {len(log_snr) - 1}, got {timesteps}")
    if len(given) == num:
        return given
    # A list made for another S: interpolate its log-SNR (Sabour et al. 2024, §4).
    log_snr_given = np.interp(given, np.arange(len(log_snr)), log_snr)
    wanted = np.interp(np.linspace(0, 1, num), np.linspace(0, 1, len(given)), log_snr_given)
    return _timesteps_at(log_snr, wanted)


def _ays(log_snr: np.ndarray, num: int, end: int) -> np.ndarray:
    # "Align your steps" for Stable Diffusion 1 (Sabour et al. 2024).
    return _given(log_snr, num, end, (999, 850, 736, 645, 545, 455, 343, 233, 124, 24))


def _lcm(log_snr: np.ndarray, num: int, end: int, distilled_steps: int = 50) -> np.ndarray:
    # Luo et al. 2023: out of the timesteps of the solver that was distilled.
    if num > distilled_steps:
        raise ValueError(f"num_steps must lie in 1 … {distilled_steps} (distilled), got {num}")
    trained = (np.arange(distilled_steps) + 1) * (len(log_snr) // distilled_steps) - 1
    return trained[::-1][np.arange(num) * distilled_steps // num]


def _timesteps_at(log_snr: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.interp(-wanted, -log_snr, np.arange(len(log_snr)))


SPACINGS: dict[str, Callable[..., np.ndarray]] = {
    "original": _original,
    "original_quad": _original_quad,
    "uniform": _uniform,
    "linspace": _linspace,
    "open": _open,
    "leading": _leading,
    "open_leading": _open_leading,
    "trailing": _trailing,
    "quad": _quad,
    "karras": _karras,
    "exponential": _exponential,
    "given": _given,
    "ays": _ays,
    "lcm": _lcm,
}


def spacing(
    name: str, schedule: NoiseSchedule, num_steps: int, *, end: int | None = None, **own: Any
) -> Timesteps:
    """Timesteps [S+1], descending: S at which the network is evaluated, and where sampling ends.

    end: −1 (clean data) or 0 (the noise of ᾱ_0, where the original LDM stops); None is 0 for the
    "original" spacings and −1 for the others. own: options of one spacing: `offset` (leading,
    open_leading), `rho` (karras), `distilled_steps` (lcm), `timesteps` (given: any list; for
    another num_steps its log-SNR is interpolated).
    int32 where every timestep is an integer, else float32. Runs on the host, not under jit.
    Raises ValueError for an unknown name or num_steps outside 1 … T.
    """
    total = schedule.num_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in 1 … {total} (the schedule's T), got {num_steps}")
    if end not in (None, CLEAN, 0):
        raise ValueError(f"end must be -1 (clean data) or 0 (the noise of alpha_0), got {end}")
    if end is None:
        end = 0 if name.startswith("original") else CLEAN
    log_snr = np.asarray(schedule.log_snr, np.float64)
    steps = lookup(SPACINGS, name, "spacing")(log_snr, num_steps, end, **own)
    steps = np.sort(np.clip(steps, 0, total - 1))[::-1]
    steps = np.append(steps, end)
    integral = bool(np.all(steps == np.round(steps)))
    return jnp.asarray(steps, jnp.int32 if integral else jnp.float32)
