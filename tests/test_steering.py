"""Guidance by gradients where Bayes' rule gives the answer in closed form, and the classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config

from latent_diffusion.generation import guides
from latent_diffusion.generation.loading import load_classifier
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.first_stage import init_first_stage
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.nets.losses.perceptual import LPIPS
from latent_diffusion.nets.pooling import Pooling
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process import steering
from latent_diffusion.process.diffusion import Prediction
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import spacing
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

SCHEDULE = make_schedule()
SCHEDULES = {
    "linear": SCHEDULE,
    "rectified_flow": make_schedule("rectified_flow"),
    "zero_snr": make_schedule(zero_terminal_snr=True),
}
CENTRES, SPREAD = np.array([-2.0, 1.0]), 0.5  # two clouds of clean latents, of equal weight
Z = jnp.asarray(np.random.default_rng(0).normal(size=(400, 1, 1, 1)), jnp.float32)
TIMES = [("linear", 30), ("linear", 300), ("linear", 700), ("linear", 990)]
TIMES += [("rectified_flow", 500), ("rectified_flow", 999), ("zero_snr", 999)]


def cloud(k, z_t, t, schedule=SCHEDULE):
    """log p(z_t | k) up to a constant, and E[z_0 | z_t, k]."""
    alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
    variance = alpha**2 * SPREAD**2 + sigma**2
    off = z_t - alpha * CENTRES[k]
    return -0.5 * off**2 / variance, CENTRES[k] + alpha * SPREAD**2 / variance * off


def shares(z_t, t, schedule):
    """log p(k | z_t) for both clouds."""
    return jax.nn.log_softmax(jnp.stack([cloud(k, z_t, t, schedule)[0] for k in (0, 1)]), axis=0)


def with_eps(z_0, z_t, t, schedule=SCHEDULE):
    return Prediction(z_0, (z_t - schedule.alpha_t(t) * z_0) / schedule.sigma_t(t))


def of_both(z_t, t, schedule=SCHEDULE):
    """The best denoiser of the mixture."""
    weights = jnp.exp(shares(z_t, t, schedule))
    z_0 = sum(weights[k] * cloud(k, z_t, t, schedule)[1] for k in (0, 1))
    return with_eps(z_0, z_t, t, schedule)


def log_prob(z_t, t, schedule=SCHEDULE):
    return shares(z_t, t, schedule)[1][:, 0, 0, 0]


@pytest.mark.parametrize(("name", "t"), TIMES)
def test_a_true_classifier_turns_the_mixture_into_the_cloud(name, t):
    """Also at pure noise, where the gradient is 0 and its factor infinite."""
    schedule, t = SCHEDULES[name], jnp.array(t)
    both, log_p = (functools.partial(f, schedule=schedule) for f in (of_both, log_prob))
    pred = steering.by_classifier(both, schedule, log_p)(Z, t)
    expected = with_eps(cloud(1, Z, t, schedule)[1], Z, t, schedule)
    scale = 1 / max(float(schedule.alpha_t(t)), 1e-3)  # of float32's errors in z_0
    np.testing.assert_allclose(pred.z_0, expected.z_0, atol=1e-4 * scale)
    np.testing.assert_allclose(pred.eps, expected.eps, atol=1e-4)


def test_guided_samples_are_those_of_the_cloud():
    denoise = steering.by_classifier(of_both, SCHEDULE, log_prob)
    timesteps = spacing("trailing", SCHEDULE, 100)
    sample = jax.jit(lambda z: SAMPLERS["ddim"](denoise, z, timesteps, SCHEDULE))
    z_0 = np.asarray(sample(Z)).ravel()
    np.testing.assert_allclose(z_0.mean(), CENTRES[1], atol=0.1)
    np.testing.assert_allclose(z_0.std(), SPREAD, atol=0.1)
    assert (z_0 > -0.5).mean() > 0.98  # nothing in the other cloud


@pytest.mark.parametrize(("name", "t"), TIMES)
def test_a_likelihood_of_z_0_gives_the_posterior(name, t):
    """Clean latents are N(0, 1), seen with noise of variance s²: everything is Gaussian."""
    schedule, t, y, s2 = SCHEDULES[name], jnp.array(t), 0.7, 0.3
    alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
    total = alpha**2 + sigma**2  # 1, but for a rectified flow
    # At pure noise both are taken one timestep before.
    atol = 1e-4 if float(alpha) else 5 * float(schedule.alpha_t(t - 1))

    def prior(z_t, t):
        alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
        return with_eps(alpha * z_t / (alpha**2 + sigma**2), z_t, t, schedule)

    def log_likelihood(z_0, t):
        alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
        variance = sigma**2 / (alpha**2 + sigma**2)
        return -0.5 * jnp.square(y - z_0[:, 0, 0, 0]) / (s2 + variance)

    z_t = jnp.sqrt(total) * jnp.clip(Z, -2, 2)  # no step is cut off
    pred = steering.by_likelihood(prior, schedule, log_likelihood)(z_t, t)
    mean, variance = alpha * z_t / total, sigma**2 / total
    expected = (s2 * mean + variance * y) / (s2 + variance)
    np.testing.assert_allclose(pred.z_0, expected, atol=atol)
    np.testing.assert_allclose(alpha * pred.z_0 + sigma * pred.eps, z_t, atol=1e-4)
    twice = steering.by_likelihood(prior, schedule, log_likelihood, 2.0)(z_t, t).z_0
    np.testing.assert_allclose(twice - mean, 2 * (expected - mean), atol=2 * atol)


def test_a_networks_gradient_at_pure_noise_does_no_harm():
    """An estimate of z_0 that follows noise, which the best one doesn't."""
    schedule, t = make_schedule("cosine"), jnp.array(999)
    assert schedule.alpha_t(t) < 1e-4
    z_t = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32)

    def network(z_t, t):
        return Prediction(0.3 * z_t, z_t)

    def log_likelihood(z_0, t):
        return -0.5 * jnp.sum(jnp.square(z_0 - 1.0), (1, 2, 3))

    moved = steering.by_likelihood(network, schedule, log_likelihood)(z_t, t).z_0 - 0.3 * z_t
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(moved**2, (1, 2, 3))), steering.LIMIT, rtol=1e-4)
    assert float(jnp.mean(moved * (1.0 - 0.3 * z_t))) > 0  # toward it


def test_the_likelihood_of_a_target_is_its_distance_to_the_reduced_picture():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
    target = jax.image.resize(images, (2, 4, 4, 3), "cubic") + 0.5
    half = steering.toward(target, lambda z_0: 2 * z_0)
    np.testing.assert_allclose(half(images / 2, jnp.array(5)), [-0.5 * 48 * 0.25] * 2, rtol=1e-4)
    other = steering.toward(target, lambda z: z, lambda x, y: jnp.max(jnp.abs(x - y), (1, 2, 3)))
    np.testing.assert_allclose(other(images, jnp.array(5)), [-0.5] * 2, rtol=1e-4)


# LDM-8's U-Net without cross-attention, halved: the paper adds 111 M parameters for its guidance.
LDM_8 = {"channel_mult": (1, 2, 4), "num_head_channels": 32, "transformer_depth": 0}


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_half_a_unet_scores_classes(pool):
    net = UNet(1000, 256, pool=pool, **LDM_8)
    latents = jnp.zeros((2, 32, 32, 4))
    logits, variables = jax.eval_shape(
        net.init_with_output, jax.random.key(0), latents, jnp.zeros(2)
    )
    assert logits.shape == (2, 1000)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables))
    if pool == "attention":
        np.testing.assert_allclose(count / 1e6, 111.6, atol=0.05)
    assert not any(name.startswith("output_blocks") for name in variables["params"])
    other = jnp.zeros((2, 64, 32, 4))
    if pool == "attention":
        with pytest.raises(
            ValueError, match=r"reads latents of 64 positions at its end, .* not 128"
        ):
            jax.eval_shape(net.apply, variables, other, jnp.zeros(2))
    else:
        assert jax.eval_shape(net.apply, variables, other, jnp.zeros(2)).shape == (2, 1000)


def test_the_mean_of_the_positions_attends_to_them_and_is_scored():
    """A head of a transformer by hand: queries of the mean, keys and values of all."""
    module, rng = Pooling("attention", 3, head_dim=4, num_groups=2), np.random.default_rng(0)
    h = rng.normal(size=(2, 2, 3, 8)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(h), [])["params"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    groups = h.reshape(2, 6, 2, 4)
    mean, var = (f(groups, (1, 3), keepdims=True) for f in (np.mean, np.var))
    x = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(2, 6, 8)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    x = x / (1 + np.exp(-x))
    x = np.concatenate([x.mean(1, keepdims=True), x], 1) + params["positions"]
    qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(2, 7, 3, 2, 4), 2, 0)
    weights = np.exp(np.einsum("bnd,bsnd->bns", q[:, 0], k) / 2)
    mixed = np.einsum("bns,bsnd->bnd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 8)
    want = mixed @ params["proj_out"]["kernel"] + params["proj_out"]["bias"]
    got = module.apply({"params": params}, jnp.asarray(h), [])
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_a_classifier_is_loaded_with_its_averaged_parameters(tmp_path, monkeypatch):
    config = make_config("classifying", **{"data.image_size": 8, "unet.attention_resolutions": ()})
    config.autoencoder.regularization = "identity"
    workdir.save_config(config, tmp_path)
    task = TASKS["classifying"](config)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0), batch_spec(config))
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        state = {
            name: jax.tree.map(
                lambda x, value=value: np.full(x.shape, value, x.dtype), shapes.params
            )
            for name, value in (("params", 1), ("ema_params", 2))
        }
        checkpoints.save(1, state)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    loaded = load_classifier(f"~/{tmp_path.name}")
    assert loaded.unet.out_channels == task.classifier.unet.out_channels
    assert {float(np.unique(x).item()) for x in jax.tree.leaves(loaded.params)} == {2.0}
    config.task = "denoising"
    workdir.save_config(config, tmp_path)
    with pytest.raises(ValueError, match="holds a run of 'denoising', not of a classifier"):
        load_classifier(tmp_path)


def test_a_target_pulls_by_the_perceptual_distance():
    params = guides.load_distance("lpips")
    pixels = init_first_stage(Identity(3), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(2)
    z, target = (jnp.asarray(rng.uniform(-1, 1, (1, 32, 32, 3)), jnp.float32) for _ in range(2))
    options = SamplingOptions(target_scale=30.0, target_distance="lpips")
    wrap = guides.guide({"target": target}, SCHEDULE, pixels, None, params, options)

    def prior(z_t, t):
        return with_eps(SCHEDULE.alpha_t(t) * z_t, z_t, t)

    @jax.jit
    def distance(t):
        seen = [denoise(z, t).z_0 for denoise in (prior, wrap(prior))]
        return [LPIPS("alex").apply({"params": params}, x, target)[0] for x in seen]

    before, after = distance(jnp.array(500))
    assert 0 < after < 0.95 * before


def test_a_classifier_and_a_target_guide_together():
    class Bright(NoisyClassifier):
        """The first class is the brighter, the more of it there is."""

        def log_prob(self, z_t, t, labels):
            return jnp.where(labels == 0, 1.0, -1.0) * z_t.sum((1, 2, 3))

    pixels = init_first_stage(Identity(3), jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    entries = {"guide_label": jnp.array([0]), "target": -jnp.ones((1, 4, 4, 3))}
    options = SamplingOptions(target_scale=0.1, classifier_scale=0.5)
    z_t, t = jnp.full((1, 4, 4, 3), 0.2), jnp.array(500)

    def guided(*names):
        batch = {name: entries[name] for name in names}
        classifier = Bright({}, SCHEDULE, UNet(2, 8)) if "guide_label" in names else None
        wrap = guides.guide(batch, SCHEDULE, pixels, classifier, None, options)
        denoise = wrap(lambda z_t, t: with_eps(SCHEDULE.alpha_t(t) * z_t, z_t, t))
        return float(denoise(z_t, t).z_0.mean())

    darker, both, brighter = guided("target"), guided(*entries), guided("guide_label")
    assert darker + 0.05 < both < brighter - 0.05, (darker, both, brighter)
