"""Samplers: `sampler(denoise, z_T, timesteps, schedule, rng, **own) -> z_0`.

denoise: `(z_t [B h w c], t scalar) -> Prediction(z_0, eps)`; guidance and everything else that
varies wraps it (`latent_diffusion.guidance`). z_T: standard normal at timesteps[0]. timesteps:
[S+1], descending, from `schedules.spacing`. rng: one key per image, which decides that image's
noise alone; deterministic samplers ignore it. A sampler is traceable and runs as one `lax.scan`.
"""

from latent_diffusion.samplers.dpm_solver import (
    dpm_solver_2m,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    dpm_solver_pp_3m_sde,
    dpm_solver_pp_singlestep,
)
from latent_diffusion.samplers.first_order import (
    ddim,
    ddim_inversion,
    ddpm,
    euler,
    euler_ancestral,
    lcm,
)
from latent_diffusion.samplers.multistep import deis, lms, plms, unipc
from latent_diffusion.samplers.runge_kutta import (
    dpm2,
    dpm2_ancestral,
    dpm_solver_pp_2s_ancestral,
    heun,
)

__all__ = ["SAMPLERS", "ddim_inversion"]

SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "lms": lms,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_pp_2s_ancestral": dpm_solver_pp_2s_ancestral,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": dpm_solver_pp_2m_sde,
    "dpm_solver_pp_3m_sde": dpm_solver_pp_3m_sde,
    "dpm_solver_pp_singlestep": dpm_solver_pp_singlestep,
    "unipc": unipc,
    "deis": deis,
    "lcm": lcm,
}
