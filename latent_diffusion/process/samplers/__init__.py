"""Samplers: `sampler(denoise, z_T, timesteps, schedule, rng, **own) -> z_0`.

denoise: `(z_t [B h w c], t scalar) -> Prediction(z_0, eps)`; guidance and everything else that
varies wraps it (`process.guidance`). z_T: standard normal at timesteps[0]. timesteps: [S+1],
descending, from `schedules.spacing`. rng: one key per image, which decides that image's
noise alone; deterministic samplers ignore it. A sampler is traceable and runs as one `lax.scan`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latent_diffusion.process.diffusion import Denoiser
from latent_diffusion.process.samplers.dpm_solver import (
    dpm_solver_2m,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    dpm_solver_pp_3m_sde,
    dpm_solver_pp_singlestep,
)
from latent_diffusion.process.samplers.first_order import (
    ddim,
    ddim_inversion,
    ddpm,
    euler,
    euler_ancestral,
    lcm,
)
from latent_diffusion.process.samplers.multistep import deis, lms, plms, unipc
from latent_diffusion.process.samplers.runge_kutta import (
    dpm2,
    dpm2_ancestral,
    dpm_solver_pp_2s_ancestral,
    heun,
)
from latent_diffusion.process.samplers.table import Table, run
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps
from latent_diffusion.types import Array, Float, Keys

__all__ = ["SAMPLERS", "Sampler", "ddim_inversion"]


@dataclass(frozen=True)
class Sampler:
    """A sampler, made of the function that tabulates its coefficients.

    table: (schedule, timesteps, **own) -> Table. `table(schedule, timesteps).t` are the timesteps
    at which the network will be evaluated. by_eps: an estimate of z_0 reaches the result through
    eps alone, so whatever changes z_0 must change eps with it (`guidance.clip` and the like).
    """

    table: Callable[..., Table]
    by_eps: bool = False

    def __call__(
        self,
        denoise: Denoiser,
        z_T: Float[Array, "B *latent"],
        timesteps: Timesteps,
        schedule: NoiseSchedule,
        rng: Keys | None = None,
        **own: Any,
    ) -> Float[Array, "B *latent"]:
        """Sample; `own` are the options of `table`."""
        return run(self.table(schedule, timesteps, **own), denoise, z_T, rng)


SAMPLERS = {
    "ddpm": Sampler(ddpm),
    "ddim": Sampler(ddim),
    "plms": Sampler(plms, by_eps=True),
    "euler": Sampler(euler),
    "euler_ancestral": Sampler(euler_ancestral),
    "heun": Sampler(heun, by_eps=True),
    "dpm2": Sampler(dpm2, by_eps=True),
    "dpm2_ancestral": Sampler(dpm2_ancestral, by_eps=True),
    "lms": Sampler(lms, by_eps=True),
    "dpm_solver_2m": Sampler(dpm_solver_2m, by_eps=True),
    "dpm_solver_pp_2s_ancestral": Sampler(dpm_solver_pp_2s_ancestral),
    "dpm_solver_pp_2m": Sampler(dpm_solver_pp_2m),
    "dpm_solver_pp_2m_sde": Sampler(dpm_solver_pp_2m_sde),
    "dpm_solver_pp_3m_sde": Sampler(dpm_solver_pp_3m_sde),
    "dpm_solver_pp_singlestep": Sampler(dpm_solver_pp_singlestep),
    "unipc": Sampler(unipc),
    "deis": Sampler(deis, by_eps=True),
    "lcm": Sampler(lcm),
}
