"""Every sampler against diffusers' scheduler of the same name, and against k-diffusion.

Same model function, same start, same injected noise. The model is the optimal eps for data at
±1 (std 0.6), written once for both array libraries. The others run in float64 as far as they let
it, so that rounding is ours alone.
"""

import importlib.util
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from scheduler_cases import CONFIGS, along_path

from latent_diffusion.convert.scheduler import from_diffusers
from latent_diffusion.core.rng import example_keys, normal_per_example
from latent_diffusion.models.denoiser import schedule_of
from latent_diffusion.process import constraints, guidance, schedules, spacings
from latent_diffusion.process.plan import own_options, plan
from latent_diffusion.process.samplers import SAMPLERS, ddim_inversion

BETAS = (0.00085, 0.012)
SHAPE = (16, 2, 2, 3)
COMMON = dict(beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="scaled_linear")
SCHEDULE = schedules.make_schedule("linear", beta_start=BETAS[0], beta_end=BETAS[1])
TOLERANCE = 1e-4  # of the latents' scale, which is about 1.2


def model(z, t, xp, kind="eps"):
    """E[eps | z_t], or another kind, with a signal amplitude that is a smooth function of t."""
    a = xp.cos(1.5 * (t + 1) / 1000)
    s = xp.sqrt(1 - a**2)
    variance = 0.36 * a**2 + s**2
    side = xp.tanh(a * z / variance)
    z_0 = side + 0.36 * a / variance * (z - a * side)
    eps = (z - a * z_0) / s
    return {"eps": eps, "x0": z_0, "v": a * eps - s * z_0, "flow": eps - z_0}[kind]


def torch_model(z, t, kind="eps"):
    return model(z, torch.as_tensor(t, dtype=torch.float64), torch, kind)


KEYS = example_keys(jax.random.key(3), SHAPE[0])
Z_T = normal_per_example(example_keys(jax.random.key(4), SHAPE[0]), SHAPE[1:])


def row_noise(i):
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, i)
    return torch.from_numpy(np.asarray(normal_per_example(keys, SHAPE[1:]), np.float64))


def ours(name, timesteps, kind="eps", schedule=SCHEDULE, clip_x0=None, **own):
    def network(z_t, t, conditioning):
        return model(z_t, t.reshape(-1, 1, 1, 1), jnp, kind)

    denoise = guidance.from_prediction(network, schedule, kind)
    if clip_x0 is not None:
        denoise = constraints.clip(denoise, schedule, -clip_x0, clip_x0, SAMPLERS[name].by_eps)

    @jax.jit
    def sample(timesteps):
        return SAMPLERS[name](denoise, Z_T, timesteps, schedule, KEYS, **own)

    return np.asarray(sample(timesteps))


def theirs(scheduler, num_steps, monkeypatch, rows=lambda call: call, **step):
    """diffusers' loop, drawing the noise that our row `rows(call)` draws."""
    calls = iter(range(10_000))
    kind = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[scheduler.config.prediction_type]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("diffusers.schedulers.scheduling_"):
            monkeypatch.setattr(
                module, "randn_tensor", lambda *a, **k: row_noise(rows(next(calls))), raising=False
            )
    scheduler.set_timesteps(num_steps)
    z = torch.from_numpy(np.asarray(Z_T, np.float64))
    if float(scheduler.init_noise_sigma) != 1:  # it works on z/alpha
        z = z * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    for t in scheduler.timesteps:
        pred = torch_model(scheduler.scale_model_input(z, t), t, kind)
        z = scheduler.step(pred, t, z, **step).prev_sample
    return z.numpy()


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.std(b))


def second_row(call):
    return 2 * call + 1


MULTISTEP = "DPMSolverMultistepScheduler"
SD = dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False)
KARRAS = dict(use_karras_sigmas=True)
# our sampler, its options, our spacing and its options, diffusers' class, its options, step options
CASES = [
    ("ddpm", {}, "leading", {}, "DDPMScheduler", dict(clip_sample=False), {}),
    ("ddpm", {}, "trailing", {}, "DDPMScheduler",
     dict(clip_sample=False, timestep_spacing="trailing"), {}),
    ("ddim", {}, "original", {}, "DDIMScheduler", SD, {}),
    ("ddim", dict(eta=1.0), "original", {}, "DDIMScheduler", SD, dict(eta=1.0)),
    ("ddim", dict(eta=0.4), "leading", {}, "DDIMScheduler", dict(clip_sample=False),
     dict(eta=0.4)),
    ("ddim", {}, "trailing", {}, "DDIMScheduler",
     dict(clip_sample=False, timestep_spacing="trailing"), {}),
    ("plms", {}, "original", {}, "PNDMScheduler",
     dict(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False), {}),
    ("euler", {}, "linspace", {}, "EulerDiscreteScheduler", {}, {}),
    ("euler", {}, "leading", dict(offset=1), "EulerDiscreteScheduler",
     dict(timestep_spacing="leading", steps_offset=1), {}),
    ("euler", {}, "karras", {}, "EulerDiscreteScheduler", KARRAS, {}),
    ("euler", {}, "exponential", {}, "EulerDiscreteScheduler", dict(use_exponential_sigmas=True),
     {}),
    ("euler_ancestral", {}, "linspace", {}, "EulerAncestralDiscreteScheduler", {}, {}),
    ("heun", {}, "linspace", {}, "HeunDiscreteScheduler", {}, {}),
    ("heun", {}, "karras", {}, "HeunDiscreteScheduler", KARRAS, {}),
    ("dpm2", {}, "linspace", {}, "KDPM2DiscreteScheduler", {}, {}),
    ("dpm2_ancestral", {}, "linspace", {}, "KDPM2AncestralDiscreteScheduler", {}, {}),
    ("lms", {}, "linspace", {}, "LMSDiscreteScheduler", {}, {}),
    ("lms", {}, "karras", {}, "LMSDiscreteScheduler", KARRAS, {}),
    ("dpm_solver_2m", {}, "open", dict(last=0), MULTISTEP,
     dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), {}),
    ("dpm_solver_pp_2m", {}, "open", {}, MULTISTEP, {}, {}),
    ("dpm_solver_pp_2m", {}, "open", dict(last=0), MULTISTEP, dict(final_sigmas_type="sigma_min"),
     {}),
    ("dpm_solver_pp_2m", dict(solver_type="heun"), "trailing", {}, MULTISTEP,
     dict(solver_type="heun", timestep_spacing="trailing"), {}),
    ("dpm_solver_pp_2m_sde", {}, "open", {}, MULTISTEP, dict(algorithm_type="sde-dpmsolver++"),
     {}),
    ("dpm_solver_pp_2m_sde", dict(solver_type="heun"), "open", {}, MULTISTEP,
     dict(algorithm_type="sde-dpmsolver++", solver_type="heun"), {}),
    # With noise, diffusers' third order has a slip of sign; k-diffusion below has not.
    ("dpm_solver_pp_3m_sde", dict(solver_type="midpoint", eta=0.0), "open", {}, MULTISTEP,
     dict(solver_order=3), {}),
    ("dpm_solver_pp_singlestep", {}, "open", {}, "DPMSolverSinglestepScheduler",
     dict(lower_order_final=True), {}),
    ("unipc", {}, "open", {}, "UniPCMultistepScheduler", {}, {}),
    ("unipc", dict(order=1), "open", {}, "UniPCMultistepScheduler", dict(solver_order=1), {}),
    ("unipc", dict(order=3), "open", {}, "UniPCMultistepScheduler", dict(solver_order=3), {}),
    ("deis", {}, "open", dict(last=0), "DEISMultistepScheduler", {}, {}),
    ("deis", dict(order=3), "open", dict(last=0), "DEISMultistepScheduler", dict(solver_order=3),
     {}),
    ("lcm", {}, "lcm", {}, "LCMScheduler", {}, {}),
    ("tcd", dict(eta=0.3), "lcm", dict(last=0), "TCDScheduler", {}, dict(eta=0.3)),
]  # fmt: skip


@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([c[0], c[2], *map(str, c[1].values())])
)
def test_equals_diffusers(case, num_steps, monkeypatch):
    name, own, spacing, spacing_own, scheduler, options, step = case
    if name == "dpm_solver_pp_3m_sde":  # whose last steps keep their order, as k-diffusion's
        options = {**options, "lower_order_final": False}
    timesteps = spacings.spacing(spacing, SCHEDULE, num_steps, **spacing_own)
    rows = second_row if name == "dpm2_ancestral" else lambda call: call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside diffusers
        scheduler = getattr(diffusers, scheduler)(**COMMON, **options)
        expected = theirs(scheduler, num_steps, monkeypatch, rows, **step)
    visited = np.asarray(scheduler.timesteps, np.float64)
    mine = np.asarray(timesteps[:-1], np.float64)
    assert set(np.round(mine, 1)) <= set(np.round(visited, 1))
    assert_close(ours(name, timesteps, **own), expected)


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_inversion_equals_diffusers(num_steps):
    scheduler = diffusers.DDIMInverseScheduler(**COMMON, clip_sample=False)
    scheduler.set_timesteps(num_steps)
    z = torch.from_numpy(np.asarray(Z_T, np.float64))
    for t in scheduler.timesteps:
        z = scheduler.step(torch_model(z, t), t, z).prev_sample
    timesteps = spacings.spacing("leading", SCHEDULE, num_steps)

    def network(z_t, t, conditioning):
        return model(z_t, t.reshape(-1, 1, 1, 1), jnp)

    denoise = guidance.from_prediction(network, SCHEDULE, "eps")
    answer = jax.jit(lambda z_0: ddim_inversion(denoise, z_0, timesteps, SCHEDULE))(Z_T)
    assert_close(np.asarray(answer), z.numpy())


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_rectified_flow_equals_diffusers(num_steps):
    """Whose timesteps count from 1."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    z = torch.from_numpy(np.asarray(Z_T, np.float64))
    for t in scheduler.timesteps:
        z = scheduler.step(torch_model(z, t - 1, "flow"), t, z).prev_sample
    schedule = schedules.make_schedule("rectified_flow")
    timesteps = spacings.spacing("linspace", schedule, num_steps)
    assert_close(ours("euler", timesteps, "flow", schedule), z.numpy())


def assert_read_alike(scheduler, num_steps, monkeypatch, rows=lambda call: call, **step):
    """What its config makes of our `sample` is what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(scheduler, num_steps, monkeypatch, rows, **step)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    diffusion, sampling = from_diffusers(config)
    schedule = schedule_of(diffusion)
    kind = diffusion["prediction"]
    timesteps, options = plan(schedule, kind, sampling, {"num_steps": num_steps, **step})
    own = {**own_options(options), "clip_x0": options.clip_x0}
    answer = ours(options.sampler, timesteps, kind, schedule, **own)
    assert_close(answer, expected)


# As in released pipelines, with what they carry over from schedulers they once had.
CARRIED = dict(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
RELEASED = {
    "stable-diffusion-v1-5": ("PNDMScheduler", CARRIED),
    "stable-diffusion-2-1": ("DDIMScheduler", {**CARRIED, "prediction_type": "v_prediction"}),
    "sdxl": (
        "EulerDiscreteScheduler",
        {**CARRIED, "timestep_spacing": "leading", "interpolation_type": "linear"},
    ),
    "sdxl-euler-ancestral": (
        "EulerAncestralDiscreteScheduler",
        {**CARRIED, "timestep_spacing": "leading"},
    ),
    "dpm-solver": (MULTISTEP, {**CARRIED, "timestep_spacing": "leading"}),
    "dpm-solver-singlestep": (
        "DPMSolverSinglestepScheduler",
        {**CARRIED, "timestep_spacing": "leading"},
    ),
    "unipc": ("UniPCMultistepScheduler", {**CARRIED, "timestep_spacing": "leading"}),
    "zero-terminal-snr": (
        "DDIMScheduler",
        dict(
            clip_sample=False,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
        ),
    ),
    "ddpm-pixels": ("DDPMScheduler", dict(clip_sample=True, beta_schedule="linear")),
    "ddpm-large-variance": ("DDPMScheduler", dict(variance_type="fixed_large", clip_sample=False)),
    "ddim-pixels": ("DDIMScheduler", dict(clip_sample=True, beta_schedule="squaredcos_cap_v2")),
    "ddim-x0": ("DDIMScheduler", dict(clip_sample=False, prediction_type="sample")),
    "lcm": ("LCMScheduler", {**CARRIED, "original_inference_steps": 50}),
}


@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_are_read(name, num_steps, monkeypatch):
    scheduler, options = RELEASED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, scheduler).from_config({**COMMON, **options})
    assert_read_alike(scheduler, num_steps, monkeypatch)


# ---------------------------------------------------------------------------------- k-diffusion


@pytest.fixture(scope="module")
def k_sampling():
    """k_diffusion.sampling alone: the package imports much that sampling doesn't need."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    names = ("torchvision", "torchvision.transforms", "torchdiffeq", "torchsde")
    missing = [name for name in names if not _importable(name)]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
    for name, attribute in (
        ("torchvision", "transforms"),
        ("torchvision.transforms", "functional"),
        ("torchdiffeq", "odeint"),
    ):
        if name in missing:
            setattr(sys.modules[name], attribute, sys.modules.get(f"{name}.{attribute}"))
    package = types.ModuleType("k_diffusion")
    package.__path__ = spec.submodule_search_locations
    sys.modules["k_diffusion"] = package
    try:
        yield importlib.import_module("k_diffusion.sampling")
    finally:
        for name in [*missing, *[n for n in sys.modules if n.startswith("k_diffusion")]]:
            del sys.modules[name]


def _importable(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


LOG_SIGMAS = -0.5 * np.asarray(SCHEDULE.log_snr, np.float64)


def k_model(x, sigma):
    """Denoised x at sigma, the timestep interpolated as k-diffusion's wrappers do."""
    t = np.interp(np.log(float(sigma[0])), LOG_SIGMAS, np.arange(1000))
    eps = torch_model(x / (1 + sigma[0] ** 2) ** 0.5, t)
    return x - sigma[0] * eps


K_CASES = [
    ("euler", "sample_euler", None),
    ("euler_ancestral", "sample_euler_ancestral", lambda call: call),
    ("heun", "sample_heun", None),
    ("dpm2", "sample_dpm_2", None),
    ("dpm2_ancestral", "sample_dpm_2_ancestral", second_row),
    ("lms", "sample_lms", None),
    ("dpm_solver_pp_2s_ancestral", "sample_dpmpp_2s_ancestral", second_row),
    ("dpm_solver_pp_2m", "sample_dpmpp_2m", None),
    ("dpm_solver_pp_sde", "sample_dpmpp_sde", "path"),
    ("dpm_solver_pp_2m_sde", "sample_dpmpp_2m_sde", lambda call: call),
    ("dpm_solver_pp_3m_sde", "sample_dpmpp_3m_sde", lambda call: call),
]


@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize("spacing", ["karras", "linspace"])
@pytest.mark.parametrize(("name", "function", "rows"), K_CASES, ids=lambda x: str(x)[:30])
def test_equals_k_diffusion(name, function, rows, spacing, num_steps, k_sampling):
    timesteps = spacings.spacing(spacing, SCHEDULE, num_steps)
    sigmas = np.exp(np.interp(np.asarray(timesteps[:-1]), np.arange(1000), LOG_SIGMAS))
    sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    calls = iter(range(10_000))
    own = {"disable": True}
    if rows == "path":
        own["noise_sampler"] = along_path(row_noise)
    elif rows is not None:
        own["noise_sampler"] = lambda *levels: row_noise(rows(next(calls)))
    x = torch.from_numpy(np.asarray(Z_T, np.float64)) * (1 + sigmas[0] ** 2) ** 0.5
    expected = getattr(k_sampling, function)(k_model, x, sigmas, **own)
    assert_close(ours(name, timesteps), expected.numpy())


def test_every_sampler_is_compared():
    by_config = {from_diffusers({"_class_name": n, **c})[1]["sampler"] for n, c in CONFIGS}
    assert by_config | {case[0] for case in [*CASES, *K_CASES]} == set(SAMPLERS)
