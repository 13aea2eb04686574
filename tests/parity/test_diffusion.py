"""Noise schedules, targets, loss weights and thresholds against diffusers'."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.training_utils import compute_snr

from latent_diffusion.process import constraints
from latent_diffusion.process.diffusion import (
    Prediction,
    prediction_target,
    q_sample,
)
from latent_diffusion.process.objectives import LOSS_WEIGHTS, posterior_variance
from latent_diffusion.process.schedules import make_schedule

CURVES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
T = np.array([0, 1, 250, 500, 998, 999])
RANDOM = np.random.default_rng(0)
Z_0, EPS = (RANDOM.normal(size=(6, 4, 4, 3)).astype(np.float32) for _ in range(2))


def both(name, zero_terminal_snr=False):
    start, end = 0.00085, 0.012
    ours = make_schedule(name, beta_start=start, beta_end=end, zero_terminal_snr=zero_terminal_snr)
    theirs = diffusers.DDIMScheduler(
        beta_start=start,
        beta_end=end,
        beta_schedule=CURVES[name],
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    return ours, theirs


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", CURVES)
def test_schedules(name, zero_terminal_snr):
    ours, theirs = both(name, zero_terminal_snr)
    np.testing.assert_allclose(
        ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", CURVES)
def test_noising_and_velocity(name):
    ours, theirs = both(name)
    z_0, eps, t = (torch.from_numpy(x) for x in (Z_0, EPS, T))
    noised = theirs.add_noise(z_0, eps, t).numpy()
    np.testing.assert_allclose(q_sample(ours, Z_0, T, EPS), noised, atol=1e-4)
    velocity = theirs.get_velocity(z_0, eps, t).numpy()
    np.testing.assert_allclose(prediction_target("v", ours, Z_0, EPS, T), velocity, atol=1e-4)


def test_min_snr_weights():
    """In the forms of diffusers' training scripts."""
    ours, theirs = both("linear")
    snr = compute_snr(theirs, torch.arange(1000)).numpy()
    bounded = np.minimum(snr, 5.0)
    for kind, expected in {"eps": bounded / snr, "v": bounded / (snr + 1)}.items():
        np.testing.assert_allclose(LOSS_WEIGHTS["min_snr"](ours, kind), expected, rtol=1e-3)


def test_posterior_variance():
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    expected = [float(scheduler._get_variance(t)) for t in T[1:]]
    np.testing.assert_allclose(posterior_variance(both("linear")[0])[T[1:]], expected, rtol=1e-3)


def test_dynamic_threshold():
    z_0 = 3 * Z_0
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=10.0
    )
    expected = scheduler._threshold_sample(torch.from_numpy(z_0)).numpy()
    denoise = constraints.dynamic_threshold(
        lambda z_t, t: Prediction(jnp.asarray(z_0), z_t), make_schedule(), 0.9, 10.0
    )
    np.testing.assert_allclose(denoise(jnp.asarray(EPS), 500).z_0, expected, atol=1e-5)
