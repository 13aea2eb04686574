"""Scheduler configs of pipelines that people load, as our samplers and spacings."""

import json

import jax
import numpy as np
import pytest
from scheduler_cases import (
    BETAS,
    CONFIGS,
    DEFAULTS,
    GOLDEN,
    LEVELS,
    PLACES,
    defaults_of,
    ours,
    title,
)

from latent_diffusion.convert.scheduler import ASSUMED, from_diffusers, to_diffusers
from latent_diffusion.convert.scheduler_classes import SCHEDULERS
from latent_diffusion.models.denoiser import schedule_of
from latent_diffusion.process.diffusion import PREDICTIONS
from latent_diffusion.process.plan import own_options, plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.spacings import spacing


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
        ({"solver_order": 1}, {"sampler": "dpm_solver_pp_singlestep", "order": 1}),
        (
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
            {"sampler": "dpm_solver_pp_singlestep", "order": 1, "eta": 1.0},
        ),
        ({"algorithm_type": "dpmsolver"}, {"sampler": "dpm_solver_2m"}),
        ({"solver_type": "heun"}, {"sampler": "dpm_solver_pp_2m", "solver_type": "heun"}),
        ({"final_sigmas_type": "sigma_min"}, {"last": 0}),
        (
            {"use_karras_sigmas": True},
            {"spacing": "karras", "within": "linspace", "network_timesteps": "round"},
        ),
        (  # whose timesteps diffusers cuts to whole ones without rounding
            {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
            {"spacing": "karras", "network_timesteps": "floor"},
        ),
        (
            {"thresholding": True, "sample_max_value": 2.0},
            {"dynamic_threshold": 0.995, "threshold_limit": 2.0},
        ),
        ({"solver_type": "bh2"}, {"solver_type": "midpoint"}),  # of a UniPC before
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
    if spacing == "linspace" and name.startswith(("DDIM", "PNDM")):
        assert sampling["sampler"] not in SAMPLERS
        return
    timesteps, options = plan(schedule, prediction, sampling, {})
    assert len(timesteps) == sampling["num_steps"] + 1 and prediction in PREDICTIONS
    table = SAMPLERS[options.sampler].table(schedule, timesteps, **own_options(options))
    for coefficients in jax.tree.leaves(table):
        assert np.all(np.isfinite(coefficients))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_setting_has_one_role(name):
    record = SCHEDULERS[name]
    assert len(record.names()) == len(record.used) + len(record.only) + len(record.harmless)
    assert record.noise or {"beta_schedule", "prediction_type"} <= record.used.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_absent_settings_have_the_defaults_of_diffusers(name):
    theirs = json.loads(DEFAULTS.read_text())[name]
    assert defaults_of(SCHEDULERS[name]).items() <= theirs.items()


REFUSED = [
    ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
    ("DDPMScheduler", {"variance_type": "fixed_large", "steps_offset": 1}, "fixed_large"),
    ("PNDMScheduler", {}, "skip_prk_steps=False has no equal here; allowed: True"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0=False has no equal here"),
    ("UniPCMultistepScheduler", {"solver_order": 4}, "solver_order=4"),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4 has no equal here"),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        "unknown algorithm_type and solver_order 'sde-dpmsolver++ 3'; known: dpmsolver 1",
    ),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "even"}, "unknown timestep_spacing 'even'"),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type='log_"),
    (
        "HeunDiscreteScheduler",
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        "use_karras_sigmas and use_beta_sigmas exclude each other",
    ),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 9.0}, "sigma_max"),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, "timestep_spacing=linspace"),
    ("SASolverScheduler", {}, "SASolverScheduler"),
]


@pytest.mark.parametrize(("name", "config", "message"), REFUSED)
def test_what_no_sampler_does_needs_another_name(name, config, message, caplog):
    """Loading warns; sampling is an error only where nobody names a sampler."""
    schedule, prediction, sampling = read(name, **config)
    assert message in caplog.text and "name" in caplog.text
    with pytest.raises(ValueError, match=r"unknown sampler .*; known: ddim"):
        plan(schedule, prediction, sampling, {})
    timesteps, options = plan(schedule, prediction, sampling, {"sampler": "heun"})
    assert options.sampler == "heun" and len(timesteps) == 51


@pytest.mark.parametrize("name", sorted({name for name, _ in CONFIGS}))
def test_latents_are_those_of_diffusers(name):
    """By numbers that the parity tests took from it."""
    golden = json.loads(GOLDEN.read_text())
    for config in [config for kind, config in CONFIGS if kind == name]:
        z_0 = ours({"_class_name": name, **BETAS, **config}, 5)
        expected = golden[title(name, config)]
        np.testing.assert_allclose(
            z_0.ravel()[PLACES], expected, atol=LEVELS / 2, err_msg=str(config)
        )


def test_settings_that_nobody_knows_are_named(caplog):
    read("DDIMScheduler", clip_sample=False, flavour="mint", _diffusers_version="0.6.0")
    assert "DDIMScheduler doesn't know flavour" in caplog.text and "_version" not in caplog.text


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
    distilled = {"sampler": "lcm", "spacing": "lcm", "distilled_steps": 20, "num_steps": 4}
    distilled["timestep_scaling"] = 5.0
    again, sampling = from_diffusers(to_diffusers(diffusion, distilled))
    assert again == diffusion
    assert {name: sampling[name] for name in distilled} == distilled


def test_a_distilled_flow_has_no_scheduler_of_diffusers():
    flow = {**ASSUMED, "schedule": "rectified_flow", "prediction": "flow"}
    with pytest.raises(ValueError, match="LCMScheduler follows no flow"):
        to_diffusers(flow, {"sampler": "lcm"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, "unknown prediction_type 'flow'; known: epsilon"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'; known: "),
        ({"beta_end": "0.02"}, "DDIMScheduler with beta_end='0.02': it must be like 0.02"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps=1000.0: it must be like 1000"),
        ({"trained_betas": [0.1, 0.2]}, "DDIMScheduler with trained_betas has no equal here"),
        ({"_class_name": None}, "names no _class_name"),
    ],
)
def test_a_noise_that_ours_lack_is_one_line(config, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers({"_class_name": "DDIMScheduler", **config})
