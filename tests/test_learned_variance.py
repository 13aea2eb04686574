"""The variance of a step that a network learns: its bound, its training, its samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_dit import model_with
from tiny import make_batch, make_config

from latent_diffusion.core.rng import example_keys, normal_per_example, sampling_keys
from latent_diffusion.models import sampling
from latent_diffusion.process.diffusion import Prediction
from latent_diffusion.process.learned_variance import bound
from latent_diffusion.process.plan import plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import spacing
from latent_diffusion.tasks import TASKS

SCHEDULE = make_schedule("sqrt_linear", beta_start=1e-4, beta_end=0.02)
SHAPE = (4, 2, 3, 2)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plainly(t, eps_hat, variance, z_0, z_t):
    """The bits per dimension of one example, step by step (Ho et al. 2020, eq. 7)."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    here, before = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
    beta, log_smallest = 1 - here / before, None
    small = beta * (1 - before) / (1 - here)
    if t == 0:  # which has none: that of t = 1
        small = (1 - alpha_bar[1] / here) * (1 - here) / (1 - alpha_bar[1])
    log_smallest, share = np.log(small), (variance + 1) / 2
    log_variance = share * np.log(beta) + (1 - share) * log_smallest
    towards, stays = np.sqrt(before) * beta / (1 - here), np.sqrt(here / before) * (1 - before)
    estimate = (z_t - np.sqrt(1 - here) * eps_hat) / np.sqrt(here)
    true, mean = (towards * x + stays / (1 - here) * z_t for x in (z_0, estimate))
    if t:
        ratio = small / np.exp(log_variance)
        off = (true - mean) ** 2 / np.exp(log_variance)
        return np.mean(ratio - 1 - np.log(ratio) + off) / 2 / np.log(2)
    upper, lower = (
        scipy.stats.norm.cdf(z_0 + side / 255, mean, np.exp(log_variance / 2)) for side in (1, -1)
    )
    lower, upper = np.where(z_0 < -0.999, 0, lower), np.where(z_0 > 0.999, 1, upper)
    return -np.mean(np.log(np.maximum(upper - lower, 1e-12))) / np.log(2)


def test_the_bound_is_that_of_the_paper_and_trains_the_variance_alone():
    t = np.array([0, 1, 300, 999])
    eps, pred, variance = (random(seed, *SHAPE) for seed in (1, 2, 3))
    z_0 = 0.8 * random(0, *SHAPE)
    assert np.abs(z_0[0]).max() > 0.999 > np.abs(z_0[0]).min()
    pred[0] = eps[0] + 0.1 * pred[0]
    a, b = (
        np.asarray(x, np.float64)[t].reshape(4, 1, 1, 1) for x in (SCHEDULE.alphas, SCHEDULE.sigmas)
    )
    z_t = (a * z_0 + b * eps).astype(np.float32)

    def loss(pred, variance):
        return bound(SCHEDULE, "eps", *map(jnp.asarray, (pred, variance, z_0, z_t, t)))

    want = [plainly(*each) for each in zip(t, pred, variance, z_0, z_t, strict=True)]
    np.testing.assert_allclose(loss(pred, variance), want, rtol=2e-3)
    of_mean, of_variance = jax.grad(lambda *x: loss(*x).sum(), (0, 1))(pred, variance)
    assert not of_mean.any() and (of_variance != 0).mean() > 0.9


def test_a_step_draws_noise_of_the_learned_variance():
    """Between −1, the posterior's, and 1, beta: their geometric mean at 0, element by element."""
    timesteps, keys = spacing("uniform", SCHEDULE, 3), example_keys(jax.random.key(0), 4)
    z_T, learned = jnp.asarray(random(0, *SHAPE)), jnp.asarray(random(1, *SHAPE))

    def run(variance=None, **options):
        def denoise(z_t, t):
            return Prediction(0.2 * z_t, z_t, variance)

        return SAMPLERS["ddpm"](denoise, z_T, timesteps, SCHEDULE, keys, **options)

    for extreme in (0, 1):
        np.testing.assert_allclose(
            run(jnp.full(SHAPE, 2.0 * extreme - 1), learned_variance=True),
            run(large_variance=float(extreme)),
            rtol=1e-5,
        )
    between = run(learned, learned_variance=True)
    alpha_bar, z = np.asarray(SCHEDULE.alphas_cumprod, np.float64), np.asarray(z_T, np.float64)
    for i, (t, s) in enumerate(itertools.pairwise(timesteps)):
        here, there = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
        beta, lost = 1 - here / there, 1 - there
        z_0 = 0.2 * z * np.sqrt(there) * beta / (1 - here)
        z = z_0 + z * np.sqrt(here / there) * lost / (1 - here)
        if s >= 0:
            noise = normal_per_example(jax.vmap(jax.random.fold_in, (0, None))(keys, i), SHAPE[1:])
            share, small = (np.asarray(learned, np.float64) + 1) / 2, beta * lost / (1 - here)
            z = z + np.exp((share * np.log(beta) + (1 - share) * np.log(small)) / 2) * noise
    np.testing.assert_allclose(between, z, rtol=2e-4, atol=1e-5)


LABELS, KEYS = [1, 4], sampling_keys(example_keys(jax.random.key(3), 2))


def sample(denoiser, **options):
    """Latents of two classes, by three steps of ancestral sampling."""
    options = {"sampler": "ddpm", "num_steps": 3, "spacing": "uniform", **options}
    timesteps, planned = plan(denoiser.schedule, denoiser.prediction, {}, options)
    null, condition = (
        denoiser.condition({"class_label": jnp.array(LABELS)}, jnp.full(2, drop))
        for drop in (True, False)
    )
    return sampling.sample(denoiser, KEYS, condition, null, timesteps, (4, 4, 4), planned)


@pytest.mark.parametrize("channels", [3, None])
def test_guidance_leaves_the_variance_and_the_other_channels_to_the_condition(channels):
    """DiT's own loop: the first three channels of eps are guided (its `forward_with_cfg`)."""
    denoiser, scale = model_with(learned_variance=True).denoiser, 4.0
    got = sample(denoiser, guidance_scale=scale, guidance_channels=channels, learned_variance=True)
    denoiser, keys, labels = denoiser.with_variance(""), KEYS, jnp.array(LABELS)
    z, guided = normal_per_example(keys.start, (4, 4, 4)), channels or 4
    null, condition = (
        denoiser.condition({"class_label": labels}, jnp.full(2, drop)) for drop in (True, False)
    )
    timesteps = spacing("uniform", denoiser.schedule, 3)

    def denoise(z_t, t):
        at = jnp.full(2, t, jnp.float32)
        without, out = (denoiser.denoise(z_t, at, c) for c in (null, condition))
        eps = (
            out[..., :4]
            .at[..., :guided]
            .set(without[..., :guided] + scale * (out - without)[..., :guided])
        )
        alpha, sigma = denoiser.schedule.alpha_t(t), denoiser.schedule.sigma_t(t)
        return Prediction((z_t - sigma * eps) / alpha, eps, out[..., 4:])

    want = SAMPLERS["ddpm"](
        denoise, z, timesteps, denoiser.schedule, keys.steps, learned_variance=True
    )
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_training_moves_the_variance_of_the_final_layer_and_nothing_else_by_the_bound():
    """At first the last layer is zero, so it alone has a gradient."""
    fields = {"width": 8, "depth": 1, "num_heads": 2, "learned_variance": True}
    config = make_config("denoising", backbone="dit", **{f"dit.{k}": v for k, v in fields.items()})
    config.conditioners = {}
    config.diffusion.drop_rate = 0.0
    batch, rng = jax.tree.map(jnp.asarray, make_batch(config)), jax.random.key(0)

    def gradient(weight):
        config.diffusion.variance_weight = weight
        task = TASKS["denoising"](config)
        state, constants = jax.jit(task.init)(rng, batch)
        keys = example_keys(rng, len(batch["image"]))

        @jax.jit
        @jax.grad
        def of(params):
            return task._loss(params, None, constants, batch, keys)["loss"].mean()

        bias = of(state.params)["dit"]["final_layer_linear"]["bias"]
        return np.split(np.asarray(bias).reshape(4, -1), 2, axis=1)

    (mean, nothing), (same, learned) = gradient(0.0), gradient(0.001)
    np.testing.assert_allclose(mean, same, rtol=1e-5)
    assert not nothing.any() and learned.all()


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"learned_variance": True}, "learned_variance needs a network with dit.learned_varia"),
        (
            {"learned_variance": True},
            {"learned_variance": True, "large_variance": 0.5},
            "give large_variance or learned_variance, not both",
        ),
        ({}, {"guidance_channels": 5}, "guidance_channels=5: the latent has 4 channels"),
    ],
)
def test_one_line_for_what_does_not_fit(fields, options, message):
    with pytest.raises(ValueError, match=message):
        sample(model_with(**fields).denoiser, **options)


def test_a_bound_on_z_0_needs_an_estimate_of_z_0_at_the_last_timestep():
    fields = {"backbone": "dit", "dit.learned_variance": True, "diffusion.variance_weight": 0.001}
    fields |= {"diffusion.zero_terminal_snr": True, "sampling.spacing": "leading"}
    TASKS["denoising"](make_config("denoising", **fields, **{"diffusion.prediction": "v"}))
    with pytest.raises(ValueError, match=r"variance_weight needs an estimate of z_0 .* v or x0"):
        TASKS["denoising"](make_config("denoising", **fields, **{"diffusion.prediction": "eps"}))


def test_a_task_refuses_to_train_a_variance_that_its_network_lacks():
    config = make_config("denoising", **{"diffusion.variance_weight": 0.001})
    with pytest.raises(ValueError, match=r"diffusion\.variance_weight needs a network with dit\."):
        TASKS["denoising"](config)
