import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import example_keys, normal_per_example
from latent_diffusion.process.diffusion import (
    PREDICTIONS,
    prediction_target,
    prior_bits_per_dim,
    q_sample,
    to_z_0_and_eps,
)
from latent_diffusion.process.objectives import (
    LOSS_WEIGHTS,
    LOSSES,
    TIMESTEP_SAMPLING,
    importance_weights,
    loss_density,
    offset_noise,
    perturb_input,
    posterior_variance,
    update_squares,
    weigh_by_logvar,
)
from latent_diffusion.process.schedules import make_schedule

LINEAR = make_schedule("linear", beta_start=0.0015, beta_end=0.0195)
SCHEDULES = {
    "linear": LINEAR,
    "zero_terminal_snr": make_schedule("linear", zero_terminal_snr=True),
    "rectified_flow": make_schedule("rectified_flow"),
}
KEYS = example_keys(jax.random.key(0), 6)
Z_0 = normal_per_example(KEYS, (2, 3, 4))
EPS = normal_per_example(example_keys(jax.random.key(1), 6), (2, 3, 4))
T = jnp.array([0, 1, 250, 500, 900, 998])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_are_inverted(kind, name):
    schedule = SCHEDULES[name]
    z_t = q_sample(schedule, Z_0, T, EPS)
    target = prediction_target(kind, schedule, Z_0, EPS, T)
    z_0, eps, _ = to_z_0_and_eps(kind, target, schedule.alpha_t(T), schedule.sigma_t(T), z_t)
    # What z_t hardly shows (eps at t = 0, z_0 at t = 998) comes back with its rounding magnified.
    magnified = 1 / jnp.minimum(schedule.alpha_t(T), schedule.sigma_t(T))[:, None, None, None]
    assert jnp.max(jnp.abs(z_0 - Z_0) / magnified) < 2e-6
    assert jnp.max(jnp.abs(eps - EPS) / magnified) < 2e-6


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_pure_noise_is_converted_without_division_by_zero(kind):
    schedule = SCHEDULES["zero_terminal_snr"]
    target = prediction_target(kind, schedule, Z_0, EPS, 999)
    z_0, eps, _ = to_z_0_and_eps(kind, target, schedule.alpha_t(999), schedule.sigma_t(999), EPS)
    np.testing.assert_allclose(z_0, Z_0, atol=1e-6)
    np.testing.assert_allclose(eps, EPS, atol=1e-6)


def test_targets():
    alpha, sigma = LINEAR.alphas[500], LINEAR.sigmas[500]
    target = {k: prediction_target(k, LINEAR, Z_0, EPS, 500) for k in PREDICTIONS}
    np.testing.assert_array_equal(target["eps"], EPS)
    np.testing.assert_array_equal(target["x0"], Z_0)
    np.testing.assert_allclose(target["v"], alpha * EPS - sigma * Z_0, rtol=1e-6)
    np.testing.assert_allclose(target["flow"], EPS - Z_0, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown prediction type 'epsilon'; known: edm, eps"):
        prediction_target("epsilon", LINEAR, Z_0, EPS, 500)


def test_q_sample_by_scalar_and_by_example():
    each = q_sample(LINEAR, Z_0, T, EPS)
    for b, t in enumerate(T):
        np.testing.assert_allclose(q_sample(LINEAR, Z_0, t, EPS)[b], each[b], rtol=1e-6)
    np.testing.assert_array_equal(q_sample(LINEAR, Z_0, -1, EPS), Z_0)


def test_losses_are_means_by_example():
    np.testing.assert_allclose(
        LOSSES["l2"](Z_0, EPS), np.mean((Z_0 - EPS) ** 2, axis=(1, 2, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(
        LOSSES["l1"](Z_0, EPS), np.mean(np.abs(Z_0 - EPS), axis=(1, 2, 3)), rtol=1e-5
    )


# ------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [  # the published formulas in float64
        ("elbo", "eps", [0.50337056, 0.50337056, 0.05186331, 0.00453382, 0.00994535]),
        ("elbo_original", "eps", [0.50337056, 0.50337056, 0.05186331, 0.00453382, 0.00994535]),
        ("elbo_original", "x0", [0.49775201, 0.49775201, 0.48758739, 0.09032146, 0.00298249]),
    ],
)
def test_golden_elbo_weights(name, kind, expected):
    weights = LOSS_WEIGHTS[name](LINEAR, kind)[jnp.array([0, 1, 10, 499, 999])]
    np.testing.assert_allclose(weights, expected, rtol=5e-7, atol=5e-9)


def test_posterior_variance():
    variance = posterior_variance(LINEAR)
    assert variance[0] == 0  # whose clipped log is −46.0517 = ln 1e-20
    betas, bar = (np.asarray(x, np.float64) for x in (LINEAR.betas, LINEAR.alphas_cumprod))
    np.testing.assert_allclose(variance[1:], betas[1:] * (1 - bar[:-1]) / (1 - bar[1:]), rtol=1e-4)
    np.testing.assert_allclose(posterior_variance(LINEAR, 1.0), betas, rtol=1e-6)
    wide = LOSS_WEIGHTS["elbo_original"](LINEAR, "eps", v_posterior=1.0)
    np.testing.assert_allclose(
        wide[1:], betas[1:] / (2 * (1 - betas[1:]) * (1 - bar[1:])), rtol=1e-4
    )


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", [n for n in LOSS_WEIGHTS if n in ("elbo", "min_snr")])
def test_weights_mean_the_same_for_every_prediction_type(name, kind):
    """An error in z_0 costs the same, whatever the network predicts."""
    t = 300
    z_t = q_sample(LINEAR, Z_0, t, EPS)
    target = prediction_target(kind, LINEAR, Z_0, EPS, t)
    pred = target + 0.1
    z_0 = to_z_0_and_eps(kind, pred, LINEAR.alpha_t(t), LINEAR.sigma_t(t), z_t).z_0
    in_kind = LOSS_WEIGHTS[name](LINEAR, kind)[t] * LOSSES["l2"](pred, target)
    in_z_0 = LOSS_WEIGHTS[name](LINEAR, "x0")[t] * LOSSES["l2"](z_0, Z_0)
    np.testing.assert_allclose(in_kind, in_z_0, rtol=1e-3)


def test_min_snr_in_its_published_forms():
    snr = np.exp(np.asarray(LINEAR.log_snr, np.float64))
    published = {
        "eps": np.minimum(snr, 5) / snr,
        "x0": np.minimum(snr, 5),
        "v": np.minimum(snr, 5) / (snr + 1),
    }
    for kind, expected in published.items():
        np.testing.assert_allclose(LOSS_WEIGHTS["min_snr"](LINEAR, kind), expected, rtol=1e-4)
    looser = LOSS_WEIGHTS["min_snr"](LINEAR, "x0", gamma=20.0)
    np.testing.assert_allclose(looser, np.minimum(snr, 20), rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_weights_are_finite(name, kind, schedule):
    if (name, schedule) == ("elbo_original", "rectified_flow"):
        pytest.skip("the original has no such schedule")
    weights = LOSS_WEIGHTS[name](SCHEDULES[schedule], kind)
    assert weights.shape == (1000,)
    assert np.all(np.isfinite(weights)) and np.all(weights >= 0)


def test_simple_weights_are_one():
    np.testing.assert_array_equal(LOSS_WEIGHTS["simple"](LINEAR, "v"), np.ones(1000))


def test_logvar_is_best_at_the_log_of_the_loss():
    loss = jnp.array([0.3, 2.0])
    best = jax.grad(lambda v: weigh_by_logvar(loss, v).sum())(jnp.log(loss))
    np.testing.assert_allclose(best, 0, atol=1e-6)
    np.testing.assert_array_equal(weigh_by_logvar(loss, jnp.zeros(2)), loss)


def test_prior_bits_per_dim():
    alpha, sigma = float(LINEAR.alphas[-1]), float(LINEAR.sigmas[-1])
    nats = np.log(1 / sigma) + (sigma**2 + alpha**2 * np.asarray(Z_0) ** 2) / 2 - 0.5
    expected = nats.mean(axis=(1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(prior_bits_per_dim(LINEAR, Z_0), expected, atol=1e-7)
    silent = prior_bits_per_dim(SCHEDULES["zero_terminal_snr"], Z_0)
    np.testing.assert_allclose(silent, 0, atol=1e-7)


# --------------------------------------------------------------------------- timesteps and noise


@pytest.mark.parametrize("name", TIMESTEP_SAMPLING)
def test_timesteps_belong_to_the_example(name):
    sample = TIMESTEP_SAMPLING[name]
    many = sample(example_keys(jax.random.key(2), 64), LINEAR)
    assert many.dtype == jnp.int32 and many.shape == (64,)
    assert np.all((many >= 0) & (many < 1000)) and len(set(many.tolist())) > 32
    np.testing.assert_array_equal(sample(example_keys(jax.random.key(2), 5), LINEAR), many[:5])


def test_every_timestep_is_drawn():
    few = make_schedule(num_timesteps=10)
    drawn = TIMESTEP_SAMPLING["uniform"](example_keys(jax.random.key(3), 500), few)
    assert set(drawn.tolist()) == set(range(10))


def test_distributions_of_timesteps():
    keys = example_keys(jax.random.key(3), 20_000)
    uniform = TIMESTEP_SAMPLING["uniform"](keys, LINEAR)
    np.testing.assert_allclose(np.quantile(uniform, [0.1, 0.5, 0.9]), [100, 500, 900], atol=15)
    middle = TIMESTEP_SAMPLING["logit_normal"](keys, LINEAR)
    np.testing.assert_allclose(np.quantile(middle, [0.159, 0.5, 0.841]), [269, 500, 731], atol=15)
    high = TIMESTEP_SAMPLING["logit_normal"](keys, LINEAR, mean=1.0, std=0.1)
    np.testing.assert_allclose(np.mean(high), 731, atol=5)
    # Esser et al. 2024, eq. 20 with s = 1.29: t falls in u.
    u = np.array([0.9, 0.75, 0.5, 0.25, 0.1])
    shares = 1 - u - 1.29 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    both = TIMESTEP_SAMPLING["mode"](keys, LINEAR)
    np.testing.assert_allclose(np.quantile(both, 1 - u), 1000 * shares, atol=15)
    even = LINEAR.log_snr[TIMESTEP_SAMPLING["importance"](keys, LINEAR)]
    low, top = LINEAR.log_snr[-1], LINEAR.log_snr[0]
    np.testing.assert_allclose(np.mean(even), (low + top) / 2, atol=0.15)
    np.testing.assert_allclose(np.std(even), (top - low) / 12**0.5, atol=0.15)


def test_importance_sampling_is_unbiased():
    schedule = make_schedule("linear", num_timesteps=4)
    density = jnp.array([1.0, 2.0, 4.0, 1.0])
    t = TIMESTEP_SAMPLING["importance"](
        example_keys(jax.random.key(4), 20_000), schedule, density=density
    )
    np.testing.assert_allclose(np.bincount(t) / 20_000, density / 8, atol=0.01)
    loss = jnp.array([3.0, 1.0, 0.5, 7.0])
    estimate = jnp.mean(importance_weights(density)[t] * loss[t])
    np.testing.assert_allclose(estimate, loss.mean(), rtol=0.03)


def test_loss_density_follows_the_loss():
    squares = update_squares(
        jnp.ones(4), jnp.array([2, 2, 0]), jnp.array([3.0, 5.0, 1.0]), decay=0.5
    )
    np.testing.assert_allclose(squares, [1, 1, 0.25 + 0.75 * 17, 1], rtol=1e-6)
    density = loss_density(squares, uniform_share=0.1)
    np.testing.assert_allclose(density.sum(), 1, rtol=1e-6)
    root = np.sqrt(squares)
    np.testing.assert_allclose(density, 0.9 * root / root.sum() + 0.025, rtol=1e-6)


def test_offset_noise_is_constant_over_space():
    added = offset_noise(KEYS, EPS, 0.5) - EPS
    np.testing.assert_allclose(added, jnp.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    assert added[0, 0, 0, 0] != added[0, 0, 0, 1] and added[0, 0, 0, 0] != added[1, 0, 0, 0]
    expected = 0.5 * normal_per_example(KEYS, (1, 1, 4))
    np.testing.assert_allclose(added[:, :1, :1], expected, atol=1e-6)


def test_perturbed_input():
    added = perturb_input(KEYS, jnp.zeros_like(EPS), 0.1)
    np.testing.assert_allclose(added, 0.1 * Z_0, rtol=1e-6)  # Z_0 has the same keys
