"""Samplers: `sampler(denoise, z_T, timesteps, schedule, rng, **options) -> z_0`.

denoise: `(z_t [B h w c], t scalar) -> Prediction(z_0, eps)`; wrappers add guidance and everything
else that varies (`process.guidance`). z_T: the latent at timesteps[0], usually standard normal
noise. timesteps: [S+1], descending, from `spacings.spacing`. rng: one key per image, which
determines the noise of only this image; deterministic samplers ignore it. A sampler can be traced
and runs as one `lax.scan`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latent_diffusion.core.types import Array, Float, Keys
from latent_diffusion.process.diffusion import Denoiser
from latent_diffusion.process.samplers import dpm_solver, first_order, multistep, runge_kutta
from latent_diffusion.process.samplers.first_order import ddim_inversion
from latent_diffusion.process.samplers.table import Table, run
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps

__all__ = ["SAMPLERS", "Sampler", "ddim_inversion"]


@dataclass(frozen=True)
class Sampler:
    """A sampler, made of the function that tabulates its coefficients.

    table: (schedule, timesteps, **options) -> Table, whose `t` are the timesteps at which the
    network will be evaluated. by_eps: the result depends only on eps, so a wrapper that changes
    the estimate of z_0 must change eps with it (`constraints.clip` and the like).
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
        **options: Any,
    ) -> Float[Array, "B *latent"]:
        """The clean latent z_0 from z_T; `options` are those of `table`."""
        return run(self.table(schedule, timesteps, **options), denoise, z_T, rng)


SAMPLERS = {
    "ddpm": Sampler(first_order.ddpm),
    "ddim": Sampler(first_order.ddim),
    "plms": Sampler(multistep.plms, by_eps=True),
    "euler": Sampler(first_order.euler),
    "euler_ancestral": Sampler(first_order.euler_ancestral),
    "heun": Sampler(runge_kutta.heun, by_eps=True),
    "dpm2": Sampler(runge_kutta.dpm2, by_eps=True),
    "dpm2_ancestral": Sampler(runge_kutta.dpm2_ancestral, by_eps=True),
    "ipndm": Sampler(multistep.ipndm, by_eps=True),
    "lms": Sampler(multistep.lms, by_eps=True),
    "dpm_solver_2m": Sampler(dpm_solver.dpm_solver_2m, by_eps=True),
    "dpm_solver_3m": Sampler(dpm_solver.dpm_solver_3m, by_eps=True),
    "dpm_solver_pp_2s_ancestral": Sampler(runge_kutta.dpm_solver_pp_2s_ancestral, by_eps=True),
    "dpm_solver_pp_sde": Sampler(runge_kutta.dpm_solver_pp_sde),
    "dpm_solver_pp_2m": Sampler(dpm_solver.dpm_solver_pp_2m),
    "dpm_solver_pp_2m_sde": Sampler(dpm_solver.dpm_solver_pp_2m_sde),
    "dpm_solver_pp_3m_sde": Sampler(dpm_solver.dpm_solver_pp_3m_sde),
    "dpm_solver_pp_singlestep": Sampler(dpm_solver.dpm_solver_pp_singlestep),
    "unipc": Sampler(multistep.unipc),
    "deis": Sampler(multistep.deis, by_eps=True),
    "lcm": Sampler(first_order.lcm),
    "tcd": Sampler(first_order.tcd),
}
