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

Timestep = Int[Array, "..."] | Float[Array, "..."] | int | float
Timesteps = Int[Array, " S_and_end"] | Float[Array, " S_and_end"]  # [S+1]

MAX_TIMESTEPS = 1_000_000
CLEAN = -1  # the timestep of noise-free data: alpha 1, sigma 0


@flax.struct.dataclass
class NoiseSchedule:
    """Tables over t = 0 … T−1 of z_t = alpha_t z_0 + sigma_t eps.

    Every method takes integer or float timesteps of any shape. A negative t stands for clean data;
    a fractional t interpolates log(sigma/alpha) linearly, as in k-diffusion; t beyond T−1 is T−1.
    """

    betas: Float[Array, " T"]  # 1 − ᾱ_t / ᾱ_{t−1}
    alphas_cumprod: Float[Array, " T"]  # ᾱ = alpha² / (alpha² + sigma²)
    alphas: Float[Array, " T"]
    sigmas: Float[Array, " T"]
    log_snr: Float[Array, " T"]  # log(alpha² / sigma²), finite also where alpha is 0

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
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
        """table[t]; for a fractional t from its energy: share(interpolated log-SNR)."""
        low, weight = self._locate(t)
        scale = jnp.hypot(self.alphas, self.sigmas)  # 1 for variance-preserving schedules
        high = jnp.minimum(low + 1, self.num_timesteps - 1)
        between = (scale[low] + weight * (scale[high] - scale[low])) * jnp.sqrt(
            share(self.log_snr_t(t))
        )
        return jnp.where(weight == 0, table[low], between)


def _cosine(num: int, start: float, end: float, offset: float) -> np.ndarray:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17); it has no start and end."""
    tau = (np.arange(num + 1) / num + offset) / (1 + offset)
    alpha_bar = np.cos(np.pi / 2 * tau) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


# (T, beta_start, beta_end, cosine_s) -> betas [T]. The names are those of CompVis: "linear" is the
# square of a line (diffusers' "scaled_linear"), "sqrt_linear" the line of Ho et al. 2020.
BETAS: dict[str, Callable[[int, float, float, float], np.ndarray]] = {
    "linear": lambda num, start, end, _: np.linspace(start**0.5, end**0.5, num) ** 2,
    "sqrt_linear": lambda num, start, end, _: np.linspace(start, end, num),
    "sqrt": lambda num, start, end, _: np.linspace(start, end, num) ** 0.5,
    "cosine": _cosine,
}


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

    name: a curve of `BETAS`, or "rectified_flow": alpha = 1 − (t+1)/T, sigma = (t+1)/T, which has
    no betas (Liu et al. 2022). betas: [T] values that replace the named curve.
    zero_terminal_snr: shift and stretch √ᾱ so that ᾱ_{T−1} = 0 (Lin et al. 2023, algorithm 1). This
    needs a network that predicts x0, v or flow, since eps determines no z_0 there.
    Raises ValueError for an unknown name, and for no timesteps or more than a million.
    """
    if not 1 <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps={num_timesteps}; expected 1 to {MAX_TIMESTEPS:,}")
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
# A spacing takes the log-SNR table [T] (float64), S, and the timestep where sampling ends, and
# returns the S timesteps of the network in either order; `spacing` sorts and bounds them and
# appends the end.


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


def _karras(log_snr: np.ndarray, num: int, end: int, rho: float = 7.0) -> np.ndarray:
    """Even steps of (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""
    sigmas = np.exp(-0.5 * log_snr)
    ramp = _ramp(sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho), num, end)
    return _timesteps_at(log_snr, -2 * rho * np.log(ramp))


def _listed(
    log_snr: np.ndarray, num: int, end: int, timesteps: Sequence[float | int]
) -> np.ndarray:
    """The timesteps of a list; where it has another length, its log-SNR is interpolated.

    Sabour et al. 2024, section 4.
    """
    listed = np.sort(np.asarray(timesteps, np.float64))[::-1]
    if not (listed[0] <= len(log_snr) - 1 and listed[-1] >= 0):
        raise ValueError(f"given timesteps must lie in 0 … {len(log_snr) - 1}, got {timesteps}")
    if len(listed) == num:
        return listed
    values = np.interp(listed, np.arange(len(log_snr)), log_snr)
    wanted = np.interp(np.linspace(0, 1, num), np.linspace(0, 1, len(listed)), values)
    return _timesteps_at(log_snr, wanted)


def _lcm(log_snr: np.ndarray, num: int, end: int, distilled_steps: int = 50) -> np.ndarray:
    """Some of the timesteps of the solver that was distilled (Luo et al. 2023)."""
    if num > distilled_steps:
        raise ValueError(f"num_steps must lie in 1 … {distilled_steps} (distilled), got {num}")
    trained = (np.arange(distilled_steps) + 1) * (len(log_snr) // distilled_steps) - 1
    return trained[::-1][np.arange(num) * distilled_steps // num]


def _timesteps_at(log_snr: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.interp(-wanted, -log_snr, np.arange(len(log_snr)))


_AYS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)  # of Stable Diffusion 1 (Sabour et al.)
SPACINGS: dict[str, Callable[..., np.ndarray]] = {
    # CompVis' range(0, T, T // S) + 1 where S divides T, and S timesteps for any other S, too.
    "original": lambda x, num, end: np.arange(num) * len(x) // num + 1,
    "original_quad": _original_quad,
    "uniform": lambda x, num, end: np.round(_ramp(len(x) - 1, 0, num, end)),
    "linspace": lambda x, num, end: _ramp(len(x) - 1, 0, num, end),
    # DPM-Solver's "open" spacings don't evaluate t = 0 even where sampling ends at clean data.
    "open": lambda x, num, end: np.round(_ramp(len(x) - 1, 0, num, 0)),
    "leading": lambda x, num, end, offset=0: np.arange(num) * (len(x) // num) + offset,
    "open_leading": lambda x, num, end, offset=0: (
        (np.arange(num) + 1) * (len(x) // (num + 1)) + offset
    ),
    "trailing": lambda x, num, end: np.round(len(x) - np.arange(num) * (len(x) / num)) - 1,
    "quad": _quad,
    "karras": _karras,
    "exponential": lambda x, num, end: _timesteps_at(x, _ramp(x[-1], x[0], num, end)),
    "given": _listed,
    "ays": lambda x, num, end: _listed(x, num, end, _AYS),  # "Align your steps"
    "lcm": _lcm,
}


def spacing(
    name: str, schedule: NoiseSchedule, num_steps: int, *, end: int | None = None, **options: Any
) -> Timesteps:
    """Timesteps [S+1], descending: the S at which the network is evaluated, and the final one.

    end: the final timestep: −1 (clean data) or 0 (the noise of ᾱ_0, where the original LDM stops);
    None is 0 for the "original" spacings and −1 for the others. options: those of one spacing:
    `offset` (leading, open_leading), `rho` (karras), `distilled_steps` (lcm), `timesteps` (given:
    a list, whose log-SNR is interpolated if its length is not num_steps).
    The result is int32 where every timestep is an integer, else float32. It is computed on the
    host, not under jit. Raises ValueError for an unknown name or num_steps outside 1 … T.
    """
    total = schedule.num_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in 1 … {total} (the schedule's T), got {num_steps}")
    if end not in (None, CLEAN, 0):
        raise ValueError(f"end must be -1 (clean data) or 0 (the noise of alpha_0), got {end}")
    if end is None:
        end = 0 if name.startswith("original") else CLEAN
    log_snr = np.asarray(schedule.log_snr, np.float64)
    steps = lookup(SPACINGS, name, "spacing")(log_snr, num_steps, end, **options)
    steps = np.sort(np.clip(steps, 0, total - 1))[::-1]
    steps = np.append(steps, end)
    integral = bool(np.all(steps == np.round(steps)))
    return jnp.asarray(steps, jnp.int32 if integral else jnp.float32)
