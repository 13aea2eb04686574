"""Noise schedules.

A noised latent is z_t = alpha_t z_0 + sigma_t eps. `make_schedule` tabulates alpha and sigma for
t = 0 … T−1 (float64 on the host, stored float32); t = −1 is clean data.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float, Int, lookup

Timestep = Int[Array, "..."] | Float[Array, "..."] | int | float
Timesteps = Int[Array, " S_and_end"] | Float[Array, " S_and_end"]  # [S+1]

MAX_TIMESTEPS = 1_000_000
CLEAN = -1  # the timestep of noise-free data: alpha 1, sigma 0


@flax.struct.dataclass
class NoiseSchedule:
    """Tables over t = 0 … T−1 of z_t = alpha_t z_0 + sigma_t eps.

    Every method takes integer or float timesteps of any shape. A negative t stands for clean data;
    a fractional t interpolates log(sigma/alpha) linearly, as in k-diffusion, or alpha and sigma if
    the path is `straight`, as that of a flow, up to T−2; t beyond T−1 is T−1.
    """

    betas: Float[Array, " T"]  # 1 − ᾱ_t / ᾱ_{t−1}
    alphas_cumprod: Float[Array, " T"]  # ᾱ = alpha² / (alpha² + sigma²)
    alphas: Float[Array, " T"]
    sigmas: Float[Array, " T"]
    log_snr: Float[Array, " T"]  # log(alpha² / sigma²), but finite if alpha is 0
    times: Float[Array, " T"] | None = None  # the network's time input; None is t itself
    straight: bool = flax.struct.field(pytree_node=False, default=False)  # alpha + sigma = 1

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
        between = self.log_snr[low] + weight * step
        if self.straight:
            alpha, sigma = (self._between(x, low, weight) for x in (self.alphas, self.sigmas))
            exact = 2 * jnp.log(jnp.where(self._ends(low), 1.0, alpha) / sigma)
            between = jnp.where((weight == 0) | self._ends(low), between, exact)
        return jnp.where(jnp.asarray(t) < 0, jnp.inf, between)

    def time_t(self, t: Timestep) -> Timestep:
        """The network's time input at t, same shape as t."""
        if self.times is None:
            return t
        return jnp.interp(t, jnp.arange(self.num_timesteps, dtype=self.times.dtype), self.times)

    def timestep_at(self, log_snr: Float[Array, "..."]) -> Float[Array, "..."]:
        """The fractional timestep in [0, T−1] of a log-SNR (inverse of `log_snr_t`)."""
        steps = jnp.arange(self.num_timesteps, dtype=self.log_snr.dtype)
        timestep = jnp.interp(-log_snr, -self.log_snr, steps)
        if self.straight:
            exact = jnp.interp(jax.nn.sigmoid(-log_snr / 2), self.sigmas, steps)
            timestep = jnp.where(self._ends(jnp.floor(timestep)), timestep, exact)
        return timestep

    def _locate(self, t: Timestep) -> tuple[Array, Array]:
        t = jnp.clip(jnp.asarray(t), 0, self.num_timesteps - 1)
        low = jnp.floor(t).astype(jnp.int32)
        return low, (t - low).astype(self.log_snr.dtype)

    def _at(self, t: Timestep, table: Array, share: Callable[[Array], Array]) -> Array:
        """table[t]; for fractional t, interpolated: √share(log-SNR) of the total amplitude."""
        low, weight = self._locate(t)
        scale = jnp.hypot(self.alphas, self.sigmas)  # 1 for variance-preserving schedules
        high = jnp.minimum(low + 1, self.num_timesteps - 1)
        between = (scale[low] + weight * (scale[high] - scale[low])) * jnp.sqrt(
            share(self.log_snr_t(t))
        )
        if self.straight:
            between = jnp.where(self._ends(low), between, self._between(table, low, weight))
        return jnp.where(weight == 0, table[low], between)

    def _ends(self, low: Array) -> Array:
        """Whether a flow's alpha falls to 0 after `low`, where float32 has too few digits."""
        return low >= self.num_timesteps - 2

    def _between(self, table: Array, low: Array, weight: Array) -> Array:
        """The table between its entries `low` and low + 1."""
        high = jnp.minimum(low + 1, self.num_timesteps - 1)
        return table[low] + weight * (table[high] - table[low])


def _cosine(num: int, start: float, end: float, offset: float) -> np.ndarray:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17), which ignores start and end."""
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
    no betas (Liu et al. 2022); or one of `_OF_DIFFUSERS`. betas: [T] values that replace the named
    curve.
    zero_terminal_snr: shift and stretch √ᾱ so that ᾱ_{T−1} = 0 (Lin et al. 2023, algorithm 1). This
    needs a network that predicts x0, v or flow, since eps determines no z_0 there.
    Raises ValueError for an unknown name, for no timesteps or more than a million, and for
    beta_start or beta_end outside [0, 1].
    """
    if not 1 <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps={num_timesteps}; expected 1 to {MAX_TIMESTEPS:,}")
    if zero_terminal_snr and betas is None and name in ("rectified_flow", *_OF_DIFFUSERS):
        raise ValueError(f"zero_terminal_snr changes betas, and the schedule {name!r} has none")
    if betas is None and name == "rectified_flow":
        sigmas = np.arange(1, num_timesteps + 1) / num_timesteps
        return dataclasses.replace(_tabulate(1 - sigmas, sigmas), straight=True)
    if betas is None and name in _OF_DIFFUSERS:
        return _OF_DIFFUSERS[name](num_timesteps, beta_start, beta_end)
    if betas is None:
        curves = {**BETAS, "rectified_flow": None, **_OF_DIFFUSERS}
        curve = lookup(curves, name, "noise schedule")
        if not (0 <= beta_start <= 1 and 0 <= beta_end <= 1):
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}; expected 0 to 1")
        betas = curve(num_timesteps, beta_start, beta_end, cosine_s)
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    if zero_terminal_snr:
        if len(root) == 1:
            raise ValueError("zero_terminal_snr needs at least 2 timesteps, not num_timesteps=1")
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return _tabulate(root, np.sqrt(1 - root**2))


def _edm(num: int, low: float, high: float, sigma_data: float) -> NoiseSchedule:
    """(z_0 + s eps) / √(s² + sigma_data²), even in log s from `low` to `high` (Karras et al. 2022).

    The network's time input is 0.25 log s. Raises ValueError for ends that can't be those of s,
    such as the usual ends of beta.
    """
    if not 0 < low < high or high < 1:
        raise ValueError(
            f"beta_start={low}, beta_end={high}; for Karras' schedule they are the least and the "
            "largest sigma, such as 0.002 and 80"
        )
    s = np.geomspace(low, high, num)
    scale = np.hypot(s, sigma_data)
    return _tabulate(1 / scale, s / scale, 0.25 * np.log(s))


def _ipndm(num: int, low: float, high: float) -> NoiseSchedule:
    """sigma = sin²(π/2 · (t+1)/T); the time input is the angle of (alpha, sigma) over π/2."""
    sigmas = np.sin(np.pi / 2 * np.arange(1, num + 1) / num) ** 2
    alphas = np.sqrt(1 - sigmas**2)
    return _tabulate(alphas, sigmas, np.arctan2(sigmas, alphas) / np.pi * 2)


# (T, beta_start, beta_end) -> schedules of some schedulers of diffusers. For "edm", the ends are
# those of sigma, and sigma_data is 0.5; for "edm_unit", it is 1.
_OF_DIFFUSERS: dict[str, Callable[[int, float, float], NoiseSchedule]] = {
    "edm": lambda num, low, high: _edm(num, low, high, 0.5),
    "edm_unit": lambda num, low, high: _edm(num, low, high, 1.0),
    "ipndm": _ipndm,
}


def _tabulate(
    alphas: np.ndarray, sigmas: np.ndarray, times: np.ndarray | None = None
) -> NoiseSchedule:
    alpha_bar = alphas**2 / (alphas**2 + sigmas**2)
    # Where alpha is 0 (zero terminal SNR), log-SNR stays finite: just below its predecessor's.
    before = alpha_bar[-2] if len(alpha_bar) > 1 else 1.0
    bounded = np.where(alpha_bar > 0, alpha_bar, min(2.0**-24, before / 2))
    log_snr = np.log(bounded) - np.log1p(-bounded)
    betas = 1 - bounded / np.append(1.0, bounded[:-1])
    stored = functools.partial(jnp.asarray, dtype=jnp.float32)
    schedule = NoiseSchedule(
        stored(betas), stored(alpha_bar), stored(alphas), stored(sigmas), stored(log_snr)
    )
    if times is None:
        return schedule
    return dataclasses.replace(schedule, times=jnp.asarray(times, jnp.float32))
