"""Scheduler configs of pipelines that people load, as our samplers and spacings."""

import jax
import numpy as np
import pytest

from latent_diffusion.convert.scheduler import ASSUMED, SCHEDULERS, from_diffusers, to_diffusers
from latent_diffusion.models.denoiser import schedule_of
from latent_diffusion.process.diffusion import PREDICTIONS
from latent_diffusion.process.plan import own_options, plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import spacing

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def read(name, **config):
    """(the schedule, the prediction, the sampling defaults) of a scheduler's config."""
    diffusion, sampling = from_diffusers({"_class_name": name, **BETAS, **config})
    return schedule_of(diffusion), diffusion["prediction"], sampling


def test_stable_diffusion_1_is_the_originals_plms():
    config = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    schedule, prediction, sampling = read("PNDMScheduler", **config)
    assert prediction == "eps"
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], 0.0046600985, rtol=1e-5)
    timesteps, options = plan(schedule, prediction, sampling, {})
    assert options.sampler == "plms" and own_options(options) == {}
    np.testing.assert_array_equal(timesteps, spacing("original", schedule, 50))


def test_velocity_with_zero_terminal_snr_and_trailing_steps():
    schedule, prediction, sampling = read(
        "DDIMScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    assert prediction == "v" and float(schedule.alphas[-1]) == 0.0
    timesteps, options = plan(schedule, prediction, sampling, {"num_steps": 4})
    assert timesteps.tolist() == [999, 749, 499, 249, -1] and options.sampler == "ddim"
    assert options.clip_x0 is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"solver_order": 1}, {"sampler": "ddim"}),
        (
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
            {"sampler": "ddim", "eta": 1.0},
        ),
        ({"algorithm_type": "dpmsolver"}, {"sampler": "dpm_solver_2m"}),
        ({"solver_type": "heun"}, {"sampler": "dpm_solver_pp_2m", "solver_type": "heun"}),
        ({"final_sigmas_type": "sigma_min"}, {"end": 0}),
        ({"use_karras_sigmas": True}, {"spacing": "karras"}),
    ],
)
def test_the_multistep_solvers_many_settings(config, expected):
    _, _, sampling = read("DPMSolverMultistepScheduler", **config)
    assert expected.items() <= sampling.items()
    assert sampling["spacing"] == expected.get("spacing", "open")


def test_settings_carried_over_from_another_scheduler_do_not_count():
    """As Stable Diffusion XL's Euler has PNDM's."""
    carried = {"set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": True}
    _, _, sampling = read("EulerDiscreteScheduler", timestep_spacing="leading", **carried)
    assert sampling == {"sampler": "euler", "num_steps": 50, "spacing": "leading", "offset": 0}


def test_pixels_are_clipped():
    assert read("DDPMScheduler")[2]["clip_x0"] == 1.0
    assert read("DDIMScheduler", clip_sample_range=2.0)[2]["clip_x0"] == 2.0
    assert "clip_x0" not in read("DDIMScheduler", clip_sample=False)[2]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_a_sampler_that_takes_its_settings(name, spacing):
    schedule, prediction, sampling = read(name, skip_prk_steps=True, timestep_spacing=spacing)
    timesteps, options = plan(schedule, prediction, sampling, {})
    assert len(timesteps) == sampling["num_steps"] + 1 and prediction in PREDICTIONS
    table = SAMPLERS[options.sampler].table(schedule, timesteps, **own_options(options))
    for coefficients in jax.tree.leaves(table):
        assert np.all(np.isfinite(coefficients))


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "linear", "prediction": "v", "zero_terminal_snr": True},
        {"schedule": "sqrt_linear", "prediction": "x0", "num_timesteps": 500},
        {"schedule": "cosine", "beta_start": 0.001, "beta_end": 0.01},
    ],
    ids=lambda fields: fields["schedule"],
)
def test_the_noise_of_a_model_is_written_and_read(fields):
    diffusion = {**ASSUMED, **fields}
    assert from_diffusers(to_diffusers(diffusion))[0] == diffusion


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "VQDiffusionScheduler"},
            "unknown scheduler 'VQDiffusionScheduler'; known",
        ),
        ({"thresholding": True}, "DDIMScheduler with thresholding has no equal here"),
        ({"trained_betas": [0.1, 0.2]}, "DDIMScheduler with trained_betas has no equal here"),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"},
            "UniPCMultistepScheduler with solver_type=bh1 has no equal here; allowed: bh2",
        ),
        ({"prediction_type": "flow"}, "unknown prediction_type 'flow'; known: epsilon"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'; known: "),
        ({"timestep_spacing": "even"}, "unknown timestep_spacing 'even'; known: leading"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps=False has no equal here"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4},
            "unknown algorithm_type and solver_order dpmsolver",
        ),
    ],
)
def test_bad_settings_are_one_line(config, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers({"_class_name": "DDIMScheduler", **config})
