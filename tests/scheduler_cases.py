"""Configs of diffusers' schedulers, and the latents that ours sample by them.

The network is the optimal one for data at ±1 (std 0.6), written once for all array libraries. Its
latents stand for pictures in [-1, 1]. The parity tests compare them with those of diffusers, and
`golden_schedulers.json` keeps some numbers of diffusers for tests without it, and
`scheduler_defaults.json` the defaults of its settings.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sampler_tables import filled

from latent_diffusion.convert.scheduler import from_diffusers
from latent_diffusion.core.rng import example_keys, normal_per_example
from latent_diffusion.models.denoiser import schedule_of
from latent_diffusion.process import constraints, guidance
from latent_diffusion.process.plan import own_options, plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.samplers.table import run

SHAPE = (8, 2, 2, 3)
ROWS = 42
LEVELS = 2 * 2 / 255  # two levels of pictures in [-1, 1]
KEYS = example_keys(jax.random.key(3), SHAPE[0])
Z_T = normal_per_example(example_keys(jax.random.key(4), SHAPE[0]), SHAPE[1:])
GOLDEN = Path(__file__).with_name("golden_schedulers.json")
DEFAULTS = Path(__file__).with_name("scheduler_defaults.json")
PLACES = [0, 17, 50, 95]  # of the latents that it keeps, of 5 steps
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


ROUNDINGS = list(guidance.ROUNDINGS.values())


def defaults_of(record):
    """The values of absent settings, by a record of `convert.scheduler_classes`."""
    return {**record.used, **{key: values[0] for key, values in record.only.items()}}


def model(z, t, xp, kind, own_time=False):
    """The optimal prediction, with a signal amplitude that is a smooth function of t.

    own_time: whether t lies between -2 and 2, as some schedules have it. For pure noise (t = 1 of
    IPNDM) z_0 is 0 then, since the first step of IPNDMScheduler ignores the network.
    """
    a = xp.cos(0.3 * (t + 3) if own_time else 1.5 * (t + 1) / 1000)
    s = xp.sqrt(1 - a**2)
    variance = 0.36 * a**2 + s**2
    side = xp.tanh(a * z / variance)
    z_0 = side + 0.36 * a / variance * (z - a * side)
    eps = (z - a * z_0) / s
    v = a * eps - s * z_0
    v = xp.where(abs(t - 1) < 1e-4, 0.0, v) if own_time else v
    return {"eps": eps, "x0": z_0, "v": v, "edm": -v}[kind]


def along_path(noise):
    """Brownian noise of steps in two stages: the first stage's is part of the whole step's.

    noise: row of the table -> what it draws. Returns a noise sampler of k-diffusion.
    """
    calls = itertools.count()

    def draw(sigma, sigma_next):
        row = next(calls)
        if row % 2 == 0:
            draw.middle = sigma_next
            return noise(row)
        share = (sigma - draw.middle) / (sigma - sigma_next)
        return share**0.5 * noise(row - 1) + (1 - share) ** 0.5 * noise(row)

    return draw


@functools.cache
def looped(kind, follow, own_time):
    """The loop of every sampler, compiled once for a prediction and a kind of constraint.

    follow: None without a constraint on z_0, else whether eps follows it.
    """

    def sample(table, schedule, rounding, spread, options):
        def network(z_t, t, conditioning):
            return model(z_t, t.reshape(-1, 1, 1, 1), jnp, kind, own_time)

        def seen(t):
            whole = jnp.select([rounding == i for i in range(3)], [f(t) for f in ROUNDINGS])
            return schedule.time_t(whole)

        network = guidance.at_timesteps(network, seen)
        denoise = guidance.from_prediction(network, schedule, kind)
        if follow is not None:
            denoise = constraints.constrained(denoise, schedule, options, None, follow)
        return run(table, denoise, spread * Z_T, KEYS)

    return jax.jit(sample)


def ours(config, num_steps, **given):
    """What a config of theirs samples here."""
    diffusion, sampling = from_diffusers(config)
    schedule, kind = schedule_of(diffusion), diffusion["prediction"]
    timesteps, options = plan(schedule, kind, sampling, {"num_steps": num_steps, **given})
    sampler = SAMPLERS[options.sampler]
    table = filled(sampler.table(schedule, timesteps, **own_options(options)), ROWS)
    bounds = (options.clip_x0, options.dynamic_threshold)
    follow = None if bounds == (None, None) else sampler.by_eps
    rounding = list(guidance.ROUNDINGS).index(options.network_timesteps or "exact")
    spread = schedule.sigma_t(timesteps[0]) if options.spread == "sigma" else 1.0
    numbers = type(options)(
        clip_x0=options.clip_x0,
        dynamic_threshold=options.dynamic_threshold,
        threshold_limit=options.threshold_limit,
    )
    return np.asarray(
        looped(kind, follow, schedule.times is not None)(table, schedule, rounding, spread, numbers)
    )


DDIM, DDPM, PNDM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, LMS = "HeunDiscreteScheduler", "LMSDiscreteScheduler"
DPM2, DPM2A = "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS, SDE = "UniPCMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSDEScheduler"
EDM, EDM_DPM = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
IPNDM, LCM, TCD = "IPNDMScheduler", "LCMScheduler", "TCDScheduler"
SPACINGS = ("leading", "linspace", "trailing")
CURVES = ("karras", "exponential", "beta")
V = dict(prediction_type="v_prediction")
ZERO_SNR = dict(rescale_betas_zero_snr=True, **V)
LATENT = dict(clip_sample=False)
MIN = dict(final_sigmas_type="sigma_min")


def title(name, config):
    return " ".join([name, *(f"{key}={value}" for key, value in config.items())])


def spaced(name, *spacings, **config):
    return [(name, dict(timestep_spacing=s, **config)) for s in spacings or SPACINGS]


def curved(name, *curves, **config):
    return [(name, {f"use_{c}_sigmas": True, **config}) for c in curves or CURVES]


CONFIGS = [
    *spaced(DDIM, "leading", "trailing", **LATENT),
    *spaced(DDIM, "trailing", **LATENT, **ZERO_SNR),
    *spaced(DDIM, "leading", **LATENT, steps_offset=1, set_alpha_to_one=False),
    (DDIM, dict(clip_sample=True, prediction_type="sample")),
    (DDIM, dict(thresholding=True, sample_max_value=1.2, dynamic_thresholding_ratio=0.9)),
    *spaced(DDPM, **LATENT),
    *spaced(DDPM, **LATENT, steps_offset=1, **V),
    (DDPM, dict(clip_sample=True, clip_sample_range=0.8)),
    (DDPM, dict(thresholding=True, sample_max_value=1.5)),
    (DDPM, dict(**LATENT, variance_type="fixed_large")),
    (DDPM, dict(**LATENT, variance_type="fixed_small_log")),
    *spaced(PNDM, "leading", "trailing", skip_prk_steps=True),
    *spaced(PNDM, "leading", "trailing", skip_prk_steps=True, steps_offset=1, **V),
    *spaced(EULER),
    *spaced(EULER, steps_offset=1, **V),
    *spaced(EULER, "trailing", "linspace", **ZERO_SNR),
    *[c for s in SPACINGS for c in curved(EULER, timestep_spacing=s, steps_offset=1)],
    *curved(EULER, sigma_min=0.1, sigma_max=10.0),
    *curved(EULER, **MIN, timestep_spacing="leading"),
    (EULER, MIN),
    *spaced(ANCESTRAL),
    *spaced(ANCESTRAL, "trailing", **ZERO_SNR),
    *spaced(HEUN),
    *[c for s in SPACINGS for c in curved(HEUN, timestep_spacing=s)],
    (HEUN, dict(clip_sample=True, clip_sample_range=0.9)),
    *spaced(DPM2), *curved(DPM2), *curved(DPM2, timestep_spacing="leading", steps_offset=1),
    *spaced(DPM2A), *curved(DPM2A, timestep_spacing="trailing"),
    *spaced(LMS), *curved(LMS), *curved(LMS, timestep_spacing="leading", **V),
    *spaced(SDE), *curved(SDE, timestep_spacing="leading"), (SDE, V),
    *spaced(MULTI), *curved(MULTI), *spaced(MULTI, steps_offset=1, **V),
    *spaced(MULTI, "trailing", **ZERO_SNR),
    (MULTI, dict(use_lu_lambdas=True)),
    *[
        (MULTI, dict(algorithm_type=a, solver_order=o, solver_type=s, **MIN))
        for a in ("dpmsolver", "dpmsolver++") for o in (1, 2, 3) for s in ("midpoint", "heun")
    ],
    *[
        (MULTI, dict(algorithm_type="sde-dpmsolver++", solver_order=o, solver_type=s))
        for o in (1, 2) for s in ("midpoint", "heun")
    ],
    (MULTI, dict(solver_order=3)),
    *curved(MULTI, solver_order=3),
    (MULTI, dict(euler_at_final=True, lower_order_final=False, **MIN)),
    (MULTI, dict(lower_order_final=False, **MIN)),
    (MULTI, dict(thresholding=True, sample_max_value=1.3, dynamic_thresholding_ratio=0.8)),
    *[
        (SINGLE, dict(solver_order=o, solver_type=s, algorithm_type=a))
        for o in (1, 2, 3) for s in ("midpoint", "heun")
        for a in ("dpmsolver++", "sde-dpmsolver++") if (o, s, a[0]) != (3, "heun", "s")
    ],
    *[
        (SINGLE, dict(solver_order=o, lower_order_final=f, **MIN))
        for o in (2, 3) for f in (False, True)
    ],
    *curved(SINGLE, lower_order_final=True),
    *spaced(UNIPC), *curved(UNIPC), *curved(UNIPC, **MIN),
    *[(UNIPC, dict(solver_order=o)) for o in (1, 3)],
    *[(UNIPC, dict(solver_order=o, solver_type="bh1", **MIN)) for o in (1, 2, 3)],
    (UNIPC, dict(disable_corrector=[0, 2, 3])),
    (UNIPC, dict(lower_order_final=False, **MIN)),
    *curved(UNIPC, "karras", sigma_min=0.1, sigma_max=10.0),
    *spaced(UNIPC, "trailing", **ZERO_SNR),
    *spaced(DEIS), *curved(DEIS), *[(DEIS, dict(solver_order=o)) for o in (1, 3)],
    (DEIS, dict(lower_order_final=False)),
    (LCM, {}), (LCM, dict(original_inference_steps=100, timestep_scaling=0.01, **V)),
    (LCM, dict(clip_sample=True, timestep_scaling=0.01)), (LCM, ZERO_SNR),
    *[(EDM, dict(sigma_schedule=s)) for s in ("karras", "exponential")],
    (EDM, dict(sigma_min=0.01, sigma_max=20.0, rho=5.0)), (EDM, dict(sigma_data=1.0, **V)),
    *[
        (EDM_DPM, dict(solver_order=o, sigma_schedule=s))
        for o in (1, 2, 3) for s in ("karras", "exponential")
    ],
    *[
        (EDM_DPM, dict(solver_order=o, solver_type="heun", algorithm_type="sde-dpmsolver++"))
        for o in (1, 2)
    ],
    (EDM_DPM, dict(thresholding=True, sample_max_value=1.3)), (EDM_DPM, dict(sigma_data=1.0, **V)),
    (EDM_DPM, dict(euler_at_final=True)),
    (IPNDM, {}),
    (TCD, {}), (TCD, dict(original_inference_steps=100, **V)),
]  # fmt: skip
