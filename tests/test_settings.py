"""Scheduler configs of pipelines that people load, as our samplers and spacings."""

import numpy as np
import pytest

from latent_diffusion.diffusion import PREDICTIONS
from latent_diffusion.samplers import SAMPLERS
from latent_diffusion.samplers.settings import SCHEDULERS, from_diffusers
from latent_diffusion.schedules import make_schedule, spacing

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def timesteps(settings, num_steps):
    schedule = make_schedule(**settings.schedule)
    return spacing(settings.spacing, schedule, num_steps, **settings.spacing_options)


def test_stable_diffusion_1_is_the_originals_plms():
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, **BETAS}
    settings = from_diffusers({**config, "set_alpha_to_one": False})
    assert (settings.sampler, settings.prediction) == ("plms", "eps")
    schedule = make_schedule(**settings.schedule)
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], 0.0046600985, rtol=1e-5)
    expected = spacing("original", schedule, 50)
    np.testing.assert_array_equal(timesteps(settings, 50), expected)


def test_velocity_with_zero_terminal_snr_and_trailing_steps():
    settings = from_diffusers(
        {
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            **BETAS,
        }
    )
    assert settings.prediction == "v"
    assert float(make_schedule(**settings.schedule).alphas[-1]) == 0.0
    assert timesteps(settings, 4).tolist() == [999, 749, 499, 249, -1]


@pytest.mark.parametrize(
    ("config", "sampler", "options"),
    [
        ({"solver_order": 1}, "ddim", {}),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, "ddim", {"eta": 1.0}),
        ({"algorithm_type": "dpmsolver"}, "dpm_solver_2m", {}),
        ({"solver_type": "heun"}, "dpm_solver_pp_2m", {"solver_type": "heun"}),
        ({"use_karras_sigmas": True}, "dpm_solver_pp_2m", {"solver_type": "midpoint"}),
    ],
)
def test_the_multistep_solvers_many_settings(config, sampler, options):
    settings = from_diffusers({"_class_name": "DPMSolverMultistepScheduler", **config})
    assert (settings.sampler, settings.options) == (sampler, options)
    karras = "use_karras_sigmas" in config
    assert settings.spacing == ("karras" if karras else "open")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_a_sampler_that_takes_its_settings(name):
    settings = from_diffusers({"_class_name": name, "skip_prk_steps": True})
    table = SAMPLERS[settings.sampler].table(
        make_schedule(**settings.schedule), timesteps(settings, 5), **settings.options
    )
    assert np.all(np.isfinite(table.t))
    assert settings.prediction in PREDICTIONS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "VQDiffusionScheduler"},
            "unknown scheduler 'VQDiffusionScheduler'; known",
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
        from_diffusers(config)
