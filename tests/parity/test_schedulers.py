"""Configs of diffusers' schedulers, read into our options: both sample the same latents.

The same network, start and noise. Theirs is the loop of a pipeline, with its scaling of the start;
ours is a table of coefficients in one compiled loop (`scheduler_cases`).
"""

import functools
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import os
import sys
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from scheduler_cases import (
    BETAS,
    CONFIGS,
    DEFAULTS,
    DPM2A,
    GOLDEN,
    KEYS,
    LEVELS,
    MIN,
    PLACES,
    SHAPE,
    Z_T,
    V,
    along_path,
    defaults_of,
    model,
    ours,
    title,
)

from latent_diffusion.convert.scheduler import from_diffusers
from latent_diffusion.convert.scheduler_classes import SCHEDULERS
from latent_diffusion.core.rng import normal_per_example
from latent_diffusion.process.samplers import SAMPLERS

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")  # deprecations inside diffusers


@functools.cache
def noise(row):
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, row)
    return torch.from_numpy(np.asarray(normal_per_example(keys, SHAPE[1:]), np.float64))


def make(name, **config):
    """Their scheduler; that of an SDE draws noise along the path that ours takes."""
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)(**config)
    if "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None:
        absent = sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
        absent.__spec__ = importlib.machinery.ModuleSpec("torchsde", None)
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return module.DPMSolverSDEScheduler(**config)


def theirs(scheduler, num_steps, monkeypatch, **step):
    """The loop of their pipelines."""
    calls = itertools.count()
    second = 2 if type(scheduler).__name__ == "KDPM2AncestralDiscreteScheduler" else 1

    def draw(*args, **kwargs):
        return noise(second * next(calls) + second - 1)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("diffusers.schedulers.scheduling_"):
            monkeypatch.setattr(module, "randn_tensor", draw, raising=False)
    kinds = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    kind = kinds[scheduler.config.get("prediction_type", "v_prediction")]
    if "sigma_data" in scheduler.config and kind == "eps":
        kind = "edm"
    own_time = "beta_start" not in scheduler.config
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = along_path(noise)
    z = torch.from_numpy(np.asarray(Z_T, np.float64)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(z, t).double()
        pred = model(seen, torch.as_tensor(t, dtype=torch.float64), torch, kind, own_time)
        z = scheduler.step(pred, t, z, **step).prev_sample.double()
    return z.numpy()


def expectation(name, config, num_steps, monkeypatch):
    """What a config samples there."""
    step = {"eta": 0.0} if name == "TCDScheduler" else {}  # as pipelines have it
    if "beta_start" not in SCHEDULERS[name].used:
        config = {key: value for key, value in config.items() if key not in BETAS}
    return theirs(make(name, **config), num_steps, monkeypatch, **step)


def difference(name, config, num_steps, monkeypatch):
    """The largest one, in levels of pictures, or of larger latents where they are larger."""
    expected = expectation(name, config, num_steps, monkeypatch)
    found = np.abs(ours({"_class_name": name, **config}, num_steps) - expected).max()
    return found / LEVELS * 2 / max(1.0, np.abs(expected).max() / 3)


# Those of flows have a test of their own, `test_sd3.py::test_the_scheduler`.
NOISED = [name for name in SCHEDULERS if not name.startswith("FlowMatch")]


def test_there_are_many():
    assert len(CONFIGS) * 3 >= 150 and {name for name, _ in CONFIGS} >= {
        name for name in NOISED if "Parallel" not in name
    }


@pytest.mark.parametrize(
    ("name", "config"),
    CONFIGS,
    ids=[title(*case) for case in CONFIGS],
)
def test_a_config_is_followed(name, config, monkeypatch):
    found = [difference(name, {**BETAS, **config}, n, monkeypatch) for n in (5, 10, 20)]
    print("levels", " ".join(f"{value:.4f}" for value in found))
    assert np.all(np.array(found) <= 2), found


# --------------------------------------------------------------------------------- every setting

# setting -> values other than any default, and what else gives the setting an effect.
OTHERS = {
    "num_train_timesteps": ([400], {}),
    "beta_start": ([0.001], {}),
    "beta_end": ([0.015], {}),
    "beta_schedule": (["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp"], {}),
    "trained_betas": ([np.linspace(0.001, 0.01, 1000).tolist()], {}),
    "prediction_type": (["epsilon", "v_prediction", "sample", "flow_prediction"], {}),
    "clip_sample": ([True, False], {}),
    "clip_sample_range": ([0.5], {"clip_sample": True}),
    "thresholding": ([True], {}),
    "dynamic_thresholding_ratio": ([0.6], {"thresholding": True, "sample_max_value": 3.0}),
    "sample_max_value": ([1.3], {"thresholding": True}),
    "set_alpha_to_one": ([True, False], {}),
    "steps_offset": ([7], {"timestep_spacing": "leading"}),
    "timestep_spacing": (["leading", "linspace", "trailing"], {}),
    "rescale_betas_zero_snr": ([True], V | {"timestep_spacing": "trailing"}),
    "variance_type": (["fixed_large", "fixed_small_log", "fixed_large_log", "learned"], {}),
    "skip_prk_steps": ([False], {}),
    "use_karras_sigmas": ([True], {}),
    "use_exponential_sigmas": ([True], {}),
    "use_beta_sigmas": ([True], {}),
    "use_lu_lambdas": ([True], {}),
    "use_flow_sigmas": ([True], {}),
    "flow_shift": ([3.0], {}),
    "use_dynamic_shifting": ([True], {}),
    "time_shift_type": (["exponential"], {}),
    "shift_terminal": ([0.1], {"use_flow_sigmas": True}),
    "sigma_min": ([0.2], {"use_karras_sigmas": True}),
    "sigma_max": ([5.0], {"use_karras_sigmas": True}),
    "interpolation_type": (["log_linear"], {}),
    "timestep_type": (["continuous"], {}),
    "final_sigmas_type": (["sigma_min"], {}),
    "solver_order": ([1, 2, 3], {}),
    "solver_type": (["midpoint", "heun", "bh1", "bh2", "logrho"], {}),
    "algorithm_type": (["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis"], {}),
    "lower_order_final": ([True, False], MIN),
    "euler_at_final": ([True], MIN),
    "lambda_min_clipped": ([-2.0], {}),
    "predict_x0": ([False], {}),
    "disable_corrector": ([[1, 2]], {}),
    "solver_p": (["DDIMScheduler"], {}),
    "original_inference_steps": ([100], {}),
    "timestep_scaling": ([0.01], {}),
    "noise_sampler_seed": ([3], {}),
    "sigma_data": ([1.0, 0.7], {}),
    "sigma_schedule": (["exponential"], {}),
    "rho": ([3.0], {}),
}
# What else a class needs to be followed.
ASKED = {"PNDMScheduler": {"skip_prk_steps": True}}


def constructor(name):
    parameters = inspect.signature(type(make(name)).__init__).parameters
    return {k: p.default for k, p in parameters.items() if k not in ("self", "kwargs")}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_record_has_the_settings_and_defaults_of_the_class(name):
    assert SCHEDULERS[name].names() == constructor(name).keys()
    assert defaults_of(SCHEDULERS[name]).items() <= constructor(name).items()


def test_the_stored_defaults_are_those_of_the_classes():
    """Which tests without diffusers compare with; WRITE_GOLDEN=1 writes them."""
    theirs = {name: constructor(name) for name in sorted(SCHEDULERS)}
    if os.environ.get("WRITE_GOLDEN"):
        lines = [f" {json.dumps(name)}: {json.dumps(values)}" for name, values in theirs.items()]
        DEFAULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert json.loads(DEFAULTS.read_text()) == json.loads(json.dumps(theirs))


@pytest.mark.parametrize("name", NOISED)
def test_no_setting_is_ignored(name, monkeypatch, caplog):
    """Another value gives the latents of theirs, or its setting is named."""
    defaults, followed = constructor(name), []
    for key in defaults:
        values, beside = OTHERS[key]
        beside = {k: v for k, v in beside.items() if k in defaults}
        for value in values:
            config = {**ASKED.get(name, {}), "num_train_timesteps": 1000, **beside, key: value}
            caplog.clear()
            try:
                _, sampling = from_diffusers({"_class_name": name, **config})
            except ValueError as error:
                assert key in str(error)
                continue
            if sampling["sampler"] not in SAMPLERS:
                assert any(k in caplog.text for k in (key, *beside)), (key, value, caplog.text)
                continue
            try:
                expected = expectation(name, config, 10, monkeypatch)
            except (NotImplementedError, ValueError):  # theirs refuses it
                continue
            # In float32, theirs loses the level below a large sigma.
            if not np.isfinite(expected).all() or (name, value) == (DPM2A, "squaredcos_cap_v2"):
                continue
            found = difference(name, config, 10, monkeypatch)
            assert found <= 2, (key, value, found)
            followed.append(key)
    assert len(followed) > 5 or name == "IPNDMScheduler"


@pytest.mark.parametrize("name", sorted({name for name, _ in CONFIGS}))
def test_the_golden_numbers_are_those_of_diffusers(name, monkeypatch):
    """Which tests without it compare with; WRITE_GOLDEN=1 writes them."""
    content = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for config in [config for kind, config in CONFIGS if kind == name]:
        expected = expectation(name, {**BETAS, **config}, 5, monkeypatch)
        golden = expected.ravel()[PLACES]
        if os.environ.get("WRITE_GOLDEN"):
            content[title(name, config)] = golden.round(4).tolist()
        np.testing.assert_allclose(content[title(name, config)], golden, atol=1e-3)
    if os.environ.get("WRITE_GOLDEN"):
        lines = [f"{json.dumps(key)}: {json.dumps(content[key])}" for key in sorted(content)]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
