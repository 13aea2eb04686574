"""Guidance and constraints, on networks simple enough to know every answer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import example_keys
from latent_diffusion.process import constraints, guidance
from latent_diffusion.process.diffusion import Prediction
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.plan import plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import spacing

SCHEDULE = make_schedule()
TIMESTEPS = spacing("trailing", SCHEDULE, 4)  # 999, 749, 499, 249, −1
SHAPE = (3, 4, 4, 2)
T = jnp.array(500)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


Z = random(0, *SHAPE)
COND, NULL, OTHER = (random(seed, *SHAPE) for seed in (1, 2, 3))
TRIPLE = (SCHEDULE, "eps")


def network(z_t, t, conditioning):
    """An eps that is linear in the conditioning."""
    return 0.3 * z_t + conditioning


def eps(denoise, t=T, z_t=Z):
    return denoise(z_t, t).eps


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol)


# -------------------------------------------------------------------------- classifier-free


@pytest.mark.parametrize("scale", [0.0, 2.5, 7])
def test_guidance_is_linear_in_the_two_predictions(scale):
    denoise = guidance.classifier_free(network, *TRIPLE, COND, NULL, scale)
    close(eps(denoise), 0.3 * Z + NULL + scale * (COND - NULL))
    pred = denoise(Z, T)
    close(SCHEDULE.alpha_t(T) * pred.z_0 + SCHEDULE.sigma_t(T) * pred.eps, Z)


def test_scale_by_image_by_step_and_one_null_for_all():
    scales = jnp.array([0.0, 1.0, 3.0])
    denoise = guidance.classifier_free(network, *TRIPLE, COND, NULL[:1], scales)
    expected = 0.3 * Z + NULL[:1] + scales.reshape(3, 1, 1, 1) * (COND - NULL[:1])
    close(eps(denoise), expected)
    values = [1.0, 2.0, 4.0, 8.0]
    by_step = guidance.per_step(jnp.array(values), TIMESTEPS)
    assert [float(by_step(t)) for t in TIMESTEPS[:-1]] == values
    # A sampler's evaluation between two steps belongs to the step that it is part of.
    assert float(by_step(jnp.array(800.0))) == 1.0 and float(by_step(jnp.array(0.5))) == 8.0
    with pytest.raises(ValueError, match="3 guidance scales for 4 steps"):
        guidance.per_step(jnp.ones(3), TIMESTEPS)


def recording(rows):
    """A network that notes how many rows each evaluation that really runs has."""

    def evaluate(z_t, t, conditioning):
        jax.debug.callback(lambda x: rows.append(len(x)), t)
        return network(z_t, t, conditioning)

    return evaluate


def run_ddim(denoise):
    sample = jax.jit(lambda z: SAMPLERS["ddim"](denoise, z, TIMESTEPS, SCHEDULE))
    z_0 = sample(Z)
    jax.effects_barrier()
    return z_0


def test_without_guidance_or_outside_its_interval_the_null_is_not_evaluated():
    rows = []
    run_ddim(guidance.classifier_free(recording(rows), *TRIPLE, COND, NULL, None))
    assert rows == [3] * 4
    rows.clear()
    some = guidance.classifier_free(recording(rows), *TRIPLE, COND, NULL, 3.0, interval=(499, 749))
    run_ddim(some)
    assert sorted(rows) == [3, 3, 6, 6]
    whole = guidance.classifier_free(network, *TRIPLE, COND, NULL, 3.0)
    close(eps(some, jnp.array(600)), eps(whole, jnp.array(600)))
    close(eps(some, jnp.array(800)), 0.3 * Z + COND)


def test_rescaling_gives_the_spread_of_the_conditional_prediction():
    def guided(rescale):
        rescale = rescale or None
        return eps(guidance.classifier_free(network, *TRIPLE, COND, NULL, 5.0, rescale=rescale))

    def std(x):
        return jnp.std(x, axis=(1, 2, 3), ddof=1)

    close(std(guided(1.0)), std(0.3 * Z + COND))
    close(guided(0.7), 0.7 * guided(1.0) + 0.3 * guided(0.0), atol=1e-4)
    assert bool(jnp.all(std(guided(0.0)) > 1.5 * std(guided(1.0))))


def test_several_prompts():
    one = guidance.composed(network, *TRIPLE, [COND], [1.0], NULL, 4.0)
    close(eps(one), eps(guidance.classifier_free(network, *TRIPLE, COND, NULL, 4.0)))
    two = guidance.composed(network, *TRIPLE, [COND, OTHER], [1.0, -0.5], NULL, 4.0)
    close(eps(two), 0.3 * Z + NULL + 4.0 * (COND - NULL - 0.5 * (OTHER - NULL)))
    # The same prompt twice with half the weight is that prompt.
    halves = guidance.composed(network, *TRIPLE, [COND, COND], [0.5, 0.5], NULL, 4.0)
    close(eps(halves), eps(one))
    with pytest.raises(ValueError, match="2 conditionings but 1 weights"):
        guidance.composed(network, *TRIPLE, [COND, OTHER], [1.0], NULL, 4.0)


@pytest.mark.parametrize(
    ("chosen", "beside"),
    [
        ({}, {}),
        ({"guidance_rescale": 0.5}, {}),
        ({"cfg_pp": True}, {}),
        ({"perpendicular": 0.5}, {"negative": OTHER}),
        ({}, {"weights": [0.5]}),
    ],
)
def test_every_kind_of_guidance_may_leave_channels_alone(chosen, beside):
    def of(channels):
        settings = {"guidance_scale": 0.6, "guidance_channels": channels, **chosen}
        timesteps, options = plan(SCHEDULE, "eps", {}, settings)
        conditionings = [NULL, COND, OTHER] if "weights" in beside else [NULL, COND]
        denoise = guidance.guided(network, *TRIPLE, conditionings, options, timesteps, **beside)
        return denoise(Z, T).z_0

    first, both = of(1), of(None)
    conditional = guidance.classifier_free(network, *TRIPLE, COND, NULL, None)(Z, T).z_0
    close(first[..., 1:], conditional[..., 1:])
    for guided in (first[..., :1] - conditional[..., :1], both[..., 1:] - conditional[..., 1:]):
        assert float(jnp.abs(guided).max()) > 0.1


def test_perpendicular_negatives_only_remove_what_is_not_shared():
    plain = guidance.classifier_free(network, *TRIPLE, COND, NULL, 4.0)
    parallel = guidance.perpendicular(network, *TRIPLE, COND, NULL + 0.5 * (COND - NULL), NULL, 4.0)
    close(eps(parallel), eps(plain), atol=1e-4)
    steered = guidance.perpendicular(network, *TRIPLE, COND, OTHER, NULL, 4.0, 2.0)
    change = eps(steered) - eps(plain)
    toward = COND - NULL
    close(jnp.sum(change * toward, (1, 2, 3)) / jnp.sum(toward**2, (1, 2, 3)), 0.0)
    away = jnp.sum(change * (OTHER - NULL), (1, 2, 3))
    assert bool(jnp.all(away < 0))


def test_perpendicular_negatives_are_weighed():
    def change(weight):
        steered = guidance.perpendicular(network, *TRIPLE, COND, OTHER, NULL, 4.0, weight)
        return eps(steered) - (0.3 * Z + NULL + 4.0 * (COND - NULL))

    close(change(2.0), 2 * change(1.0), atol=1e-4)
    assert float(jnp.abs(change(1.0)).max()) > 0.1


def test_cfg_pp_takes_z_0_from_the_guided_and_eps_from_the_null_prediction():
    pred = guidance.classifier_free_pp(network, *TRIPLE, COND, NULL, 0.6)(Z, T)
    guided = guidance.classifier_free(network, *TRIPLE, COND, NULL, 0.6)(Z, T)
    close(pred.z_0, guided.z_0)
    close(pred.eps, 0.3 * Z + NULL)


def test_a_network_gets_rounded_timesteps():
    seen = guidance.at_timesteps(lambda z_t, t, conditioning: t, guidance.ROUNDINGS["floor"])
    close(seen(Z, jnp.array([3.7, 4.0, 4.9995]), None), [3, 4, 5])


def test_bad_conditionings():
    with pytest.raises(ValueError, match=r"guidance scale 3\.0 needs a null conditioning"):
        guidance.classifier_free(network, *TRIPLE, COND, None, 3.0)
    with pytest.raises(ValueError, match="must have the same shape but for the batch"):
        guidance.classifier_free(network, *TRIPLE, COND, NULL[:, :2], 3.0)
    with pytest.raises(ValueError, match="must have the same fields"):
        guidance.classifier_free(network, *TRIPLE, {"a": COND}, {"b": NULL}, 3.0)


# ------------------------------------------------------------------------ constraints on z_0

BIG = 4.0 * random(4, *SHAPE)


def answers(z_0):
    """A denoiser with this z_0."""
    return lambda z_t, t: Prediction(z_0, (z_t - SCHEDULE.alpha_t(t) * z_0) / SCHEDULE.sigma_t(t))


CONSTRAINTS = {
    "clip": constraints.clip,
    "dynamic_threshold": constraints.dynamic_threshold,
    "norm_threshold": lambda *a, **k: constraints.norm_threshold(*a, 1.0, **k),
    "quantize": lambda *a, **k: constraints.quantize(*a, jnp.round, **k),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_eps_follows_a_constraint_or_stays(name):
    constrain = CONSTRAINTS[name]
    before = answers(BIG)(Z, T)
    follows = constrain(answers(BIG), SCHEDULE, recompute_eps=True)(Z, T)
    close(SCHEDULE.alpha_t(T) * follows.z_0 + SCHEDULE.sigma_t(T) * follows.eps, Z)
    stays = constrain(answers(BIG), SCHEDULE, recompute_eps=False)(Z, T)
    close(stays.eps, before.eps)
    close(stays.z_0, follows.z_0)
    assert bool(jnp.any(stays.z_0 != before.z_0))


@pytest.mark.parametrize("recompute_eps", [True, False])
@pytest.mark.parametrize(
    ("given", "nearest", "name"),
    [
        ({"clip_x0": 1.0}, None, "clip"),
        ({"dynamic_threshold": 0.995, "threshold_limit": None}, None, "dynamic_threshold"),
        ({}, jnp.round, "quantize"),
    ],
)
def test_an_option_is_its_constraint(given, nearest, name, recompute_eps):
    off = {"clip_x0": None, "dynamic_threshold": None}
    denoise, options = answers(BIG), SamplingOptions(**{**off, **given})
    got = constraints.constrained(denoise, SCHEDULE, options, nearest, recompute_eps)(Z, T)
    want = CONSTRAINTS[name](denoise, SCHEDULE, recompute_eps=recompute_eps)(Z, T)
    close(got.z_0, want.z_0)
    close(got.eps, want.eps)


def test_constraints_do_what_they_say():
    clipped = constraints.clip(answers(BIG), SCHEDULE, -0.5, 2.0)(Z, T).z_0
    assert float(clipped.min()) == -0.5 and float(clipped.max()) == 2.0
    # The quantile of |z_0| becomes 1, and what is within [−1, 1] already is left alone.
    bounded = constraints.dynamic_threshold(answers(BIG), SCHEDULE, 0.9)(Z, T).z_0
    bound = jnp.quantile(jnp.abs(BIG), 0.9, axis=(1, 2, 3), keepdims=True)
    inner = jnp.abs(BIG) <= bound
    close(jnp.where(inner, bounded * bound, 0.0), jnp.where(inner, BIG, 0.0))
    assert float(jnp.abs(bounded).max()) == 1.0
    small = 0.1 * BIG / jnp.abs(BIG).max()
    close(constraints.dynamic_threshold(answers(small), SCHEDULE)(Z, T).z_0, small)
    low = constraints.dynamic_threshold(answers(BIG), SCHEDULE, 0.9, limit=1.0)(Z, T).z_0
    close(low, jnp.clip(BIG, -1, 1))
    # The norm: shrunk to the limit, direction kept, shorter ones untouched.
    shrunk = constraints.norm_threshold(answers(BIG), SCHEDULE, 0.8)(Z, T).z_0
    close(jnp.sqrt(jnp.mean(shrunk**2, (1, 2, 3))), 0.8)
    close(shrunk * BIG[:, :1, :1, :1], BIG * shrunk[:, :1, :1, :1], atol=1e-4)
    close(constraints.norm_threshold(answers(small), SCHEDULE, 0.8)(Z, T).z_0, small)
    close(constraints.quantize(answers(BIG), SCHEDULE, jnp.round)(Z, T).z_0, jnp.round(BIG))


# --------------------------------------------------------------------------- starting from z_0

KEYS = example_keys(jax.random.key(0), 3)
MASK = jnp.zeros((3, 4, 4, 1)).at[:, :2].set(1.0)


def test_inpainting_shows_the_network_the_known_part_at_the_right_noise():
    seen = guidance.inpaint(lambda z_t, t: Prediction(z_t, z_t), SCHEDULE, COND, MASK, KEYS)
    hole, kept = seen(Z, T).z_0[:, :2], seen(Z, T).z_0[:, 2:]
    close(hole, Z[:, :2])
    noise = (kept - SCHEDULE.alpha_t(T) * COND[:, 2:]) / SCHEDULE.sigma_t(T)
    assert abs(float(noise.mean())) < 0.4 and 0.7 < float(noise.std()) < 1.3
    # Noise belongs to the image and the timestep.
    close(seen(Z, T).z_0, seen(Z, T).z_0)
    other = seen(Z, jnp.array(499)).z_0[:, 2:]
    fresh = (other - SCHEDULE.alpha_t(499) * COND[:, 2:]) / SCHEDULE.sigma_t(499)
    assert float(jnp.abs(fresh - noise).max()) > 0.5
    alone = guidance.inpaint(
        lambda z_t, t: Prediction(z_t, z_t), SCHEDULE, COND[1:2], MASK[1:2], KEYS[1:2]
    )
    close(alone(Z[1:2], T).z_0, seen(Z, T).z_0[1:2])


def test_an_inpainted_latent_is_known_outside_the_hole():
    denoise = guidance.inpaint(answers(OTHER), SCHEDULE, COND, MASK, KEYS)
    z = guidance.paste(SAMPLERS["ddim"](denoise, Z, TIMESTEPS, SCHEDULE), COND, MASK)
    np.testing.assert_array_equal(z[:, 2:], COND[:, 2:])
    close(z[:, :2], OTHER[:, :2])


def test_a_bound_reaches_both_stages_of_dpm_solver_2s():
    """DPM-Solver++(2S) on clipped estimates, in k-diffusion's variables x = z/alpha and sigma."""
    name = "dpm_solver_pp_2s_ancestral"

    def estimate(z_t, t):
        z_0 = 1.4 * jnp.sin(2 * z_t) + 0.3 * COND
        alpha_t, sigma_t = SCHEDULE.alpha_t(t), SCHEDULE.sigma_t(t)
        return Prediction(z_0, (z_t - alpha_t * z_0) / sigma_t)

    def clipped(x, sigma):
        t = SCHEDULE.timestep_at(-2 * jnp.log(sigma))
        return jnp.clip(estimate(SCHEDULE.alpha_t(t) * x, t).z_0, -1, 1)

    sampler = SAMPLERS[name]
    denoise = constraints.clip(estimate, SCHEDULE, recompute_eps=sampler.by_eps)
    got = sampler(denoise, Z, TIMESTEPS, SCHEDULE, eta=0.0)
    sigmas = SCHEDULE.sigma_t(TIMESTEPS) / SCHEDULE.alpha_t(TIMESTEPS)
    x = Z / SCHEDULE.alpha_t(TIMESTEPS[0])
    for here, there in itertools.pairwise(sigmas[:-1]):
        h, middle = jnp.log(here / there), jnp.sqrt(here * there)
        inner = middle / here * x - jnp.expm1(-h / 2) * clipped(x, here)
        x = there / here * x - jnp.expm1(-h) * clipped(inner, middle)
    close(got, clipped(x, sigmas[-2]), 2e-4)
