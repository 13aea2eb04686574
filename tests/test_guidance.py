"""Guidance and constraints, on networks simple enough to guide by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion import guidance
from latent_diffusion.diffusion import Prediction
from latent_diffusion.rng import example_keys
from latent_diffusion.samplers import SAMPLERS
from latent_diffusion.samplers.exact import Mixture
from latent_diffusion.schedules import make_schedule, spacing

SCHEDULE = make_schedule("linear", beta_start=0.0015, beta_end=0.0195)
T = jnp.asarray(400.0)
ALPHA, SIGMA = SCHEDULE.alpha_t(T), SCHEDULE.sigma_t(T)
SHAPE = (2, 2, 2, 1)


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


Z_T = normal(0)
# A network whose prediction of eps is the conditioning itself, plus a tenth of its input.
COND, NULL, OTHER = normal(1), normal(2), normal(3)
KEYS = example_keys(jax.random.key(0), 2)


def network(z_t, t, conditioning):
    return conditioning + 0.1 * z_t


def eps_of(conditioning):
    return conditioning + 0.1 * Z_T


def check(prediction, eps):
    """The prediction is this eps, and the z_0 that belongs to it."""
    np.testing.assert_allclose(prediction.eps, eps, atol=1e-5)
    np.testing.assert_allclose(prediction.z_0, (Z_T - SIGMA * eps) / ALPHA, atol=1e-4)


def guided(scale, null=NULL, **options):
    return guidance.classifier_free(network, SCHEDULE, "eps", COND, null, scale, **options)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -1.0])
def test_scale_extrapolates_from_null_to_condition(scale):
    check(guided(scale)(Z_T, T), eps_of(NULL) + scale * (COND - NULL))


def test_each_image_may_have_its_scale_and_one_null_serves_all():
    scale = jnp.array([2.0, 5.0])
    one_null = NULL[:1]
    expected = eps_of(one_null) + scale[:, None, None, None] * (COND - one_null)
    check(guided(scale, one_null)(Z_T, T), expected)


def test_scale_by_step_holds_from_its_timestep_to_the_next():
    timesteps = spacing("trailing", SCHEDULE, 4)
    values = jnp.array([1.0, 2.0, 3.0, 4.0])
    scale = guidance.per_step(values, timesteps)
    assert [float(scale(t)) for t in timesteps[:-1]] == [1, 2, 3, 4]
    between = (timesteps[1] + timesteps[2]) / 2
    assert float(scale(between)) == 2
    out = guided(scale)(Z_T, timesteps[2])
    np.testing.assert_allclose(out.eps, eps_of(NULL) + 3 * (COND - NULL), atol=1e-5)
    with pytest.raises(ValueError, match="3 guidance scales for 4 steps"):
        guidance.per_step(values[:3], timesteps)


def test_outside_the_interval_the_null_is_not_even_evaluated():
    rows = []

    def counting(z_t, t, conditioning):
        jax.debug.callback(lambda size=z_t.shape[0]: rows.append(size))
        return network(z_t, t, conditioning)

    denoise = jax.jit(
        guidance.classifier_free(counting, SCHEDULE, "eps", COND, NULL, 3.0, interval=(300, 500))
    )
    for t in (299.0, 300.0, 500.0, 501.0):
        out = denoise(Z_T, jnp.asarray(t))
        inside = 300 <= t <= 500
        expected = eps_of(NULL) + 3 * (COND - NULL) if inside else eps_of(COND)
        np.testing.assert_allclose(out.eps, expected, atol=1e-5)
    jax.effects_barrier()
    assert rows == [2, 4, 4, 2]
    rows.clear()
    guidance.classifier_free(counting, SCHEDULE, "eps", COND, NULL, 1)(Z_T, T)
    jax.effects_barrier()
    assert rows == [2]


@pytest.mark.parametrize("rescale", [0.0, 0.5, 1.0])
def test_rescale_moves_the_deviation_towards_the_conditional_one(rescale):
    plain = np.asarray(eps_of(NULL) + 7.0 * (COND - NULL))
    std = lambda x: np.asarray(x).std((1, 2, 3), ddof=1, keepdims=True)  # noqa: E731
    expected = plain * (1 - rescale) + plain * std(eps_of(COND)) / std(plain) * rescale
    got = guided(7.0, rescale=rescale)(Z_T, T).eps
    np.testing.assert_allclose(got, expected, atol=1e-4)
    if rescale == 1.0:
        np.testing.assert_allclose(std(got), std(eps_of(COND)), rtol=1e-4)


def test_cfg_pp_guides_z_0_but_keeps_the_nulls_eps():
    denoise = guidance.classifier_free_pp(network, SCHEDULE, "eps", COND, NULL, 0.6)
    out = denoise(Z_T, T)
    np.testing.assert_allclose(out.eps, eps_of(NULL), atol=1e-5)
    np.testing.assert_allclose(out.z_0, guided(0.6)(Z_T, T).z_0, atol=1e-4)


def test_composition_adds_weighted_directions():
    both = guidance.composed(network, SCHEDULE, "eps", [COND, OTHER], [0.75, -0.5], NULL, 2.0)
    check(both(Z_T, T), eps_of(NULL) + 2 * (0.75 * (COND - NULL) - 0.5 * (OTHER - NULL)))
    alone = guidance.composed(network, SCHEDULE, "eps", [COND], [1.0], NULL, 3.0)
    check(alone(Z_T, T), guided(3.0)(Z_T, T).eps)
    with pytest.raises(ValueError, match="1 conditionings but 2 weights"):
        guidance.composed(network, SCHEDULE, "eps", [COND], [1.0, 2.0], NULL, 3.0)


def test_perpendicular_negative_leaves_the_prompts_direction_alone():
    def run(negative, scale=2.0):
        return guidance.perpendicular(network, SCHEDULE, "eps", COND, negative, NULL, scale)(
            Z_T, T
        ).eps

    # A negative along the prompt has nothing perpendicular: it changes nothing.
    parallel = NULL + 0.3 * (COND - NULL)
    np.testing.assert_allclose(run(parallel), guided(2.0)(Z_T, T).eps, atol=1e-4)
    # Any other takes nothing away along the prompt's direction.
    change = np.asarray(run(OTHER) - guided(2.0)(Z_T, T).eps)
    assert np.abs(change).max() > 0.1
    along = (change * np.asarray(COND - NULL)).sum((1, 2, 3))
    np.testing.assert_allclose(along, 0, atol=1e-4)


def test_conditionings_that_cannot_share_a_batch_are_named():
    with pytest.raises(ValueError, match="needs a null conditioning"):
        guided(2.0, None)
    with pytest.raises(ValueError, match="must have the same shape but for the batch"):
        guided(2.0, normal(0, (2, 2, 2, 3)))
    with pytest.raises(ValueError, match="must have the same fields"):
        guidance.classifier_free(network, SCHEDULE, "eps", {"a": COND}, {"b": NULL}, 2.0)


# ------------------------------------------------------------------------------ constraints


def at(z_0):
    """A denoiser that answers z_0 whatever it sees."""
    return lambda z_t, t: Prediction(
        jnp.asarray(z_0, jnp.float32),
        (z_t - SCHEDULE.alpha_t(t) * z_0) / SCHEDULE.sigma_t(t),
    )


def consistent(out):
    """alpha z_0 + sigma eps is z_t again."""
    np.testing.assert_allclose(ALPHA * out.z_0 + SIGMA * out.eps, Z_T, atol=1e-5)


def test_clip_keeps_the_bounds_and_eps_follows():
    z_0 = 3 * normal(4)
    out = guidance.clip(at(z_0), SCHEDULE)(Z_T, T)
    np.testing.assert_allclose(out.z_0, np.clip(z_0, -1, 1))
    consistent(out)
    kept = guidance.clip(at(z_0), SCHEDULE, recompute_eps=False)(Z_T, T)
    np.testing.assert_array_equal(kept.eps, at(z_0)(Z_T, T).eps)


def test_dynamic_threshold_scales_each_example_by_its_own_quantile():
    z_0 = jnp.stack([5 * normal(5)[0], 0.1 * normal(5)[1]])
    out = guidance.dynamic_threshold(at(z_0), SCHEDULE, ratio=0.75)(Z_T, T)
    bound = np.quantile(np.abs(z_0[0]), 0.75)
    np.testing.assert_allclose(out.z_0[0], np.clip(z_0[0], -bound, bound) / bound, rtol=1e-5)
    np.testing.assert_allclose(out.z_0[1], z_0[1], rtol=1e-5)  # within [-1, 1]: as it was
    consistent(out)
    low = guidance.dynamic_threshold(at(z_0), SCHEDULE, ratio=0.75, ceiling=2.0)(Z_T, T)
    np.testing.assert_allclose(low.z_0[0], np.clip(z_0[0], -2, 2) / 2, rtol=1e-5)


def test_norm_threshold_limits_the_root_mean_square():
    z_0 = jnp.stack([5 * normal(5)[0], 0.1 * normal(5)[1]])
    out = guidance.norm_threshold(at(z_0), SCHEDULE, 1.5)(Z_T, T)
    rms = np.sqrt(np.square(out.z_0).mean((1, 2, 3)))
    np.testing.assert_allclose(rms[0], 1.5, rtol=1e-5)
    np.testing.assert_allclose(out.z_0[1], z_0[1], rtol=1e-6)


def test_quantize_answers_codes_and_keeps_eps_as_the_original_does():
    z_0 = normal(6)
    denoise = guidance.quantize(at(z_0), SCHEDULE, jnp.round)
    np.testing.assert_array_equal(denoise(Z_T, T).z_0, np.round(z_0))
    np.testing.assert_array_equal(denoise(Z_T, T).eps, at(z_0)(Z_T, T).eps)
    consistent(guidance.quantize(at(z_0), SCHEDULE, jnp.round, recompute_eps=True)(Z_T, T))


# ------------------------------------------------------------------------- starting from z_0

GAUSSIAN = Mixture(jnp.array([1.5, 1.5]), jnp.array(0.4), jnp.array([0.5, 0.5]))


def ddim(denoise, timesteps, z_T=Z_T):
    return SAMPLERS["ddim"](denoise, z_T, timesteps, SCHEDULE, KEYS)


def test_inpainting_shows_the_known_part_at_the_level_of_each_step():
    """The network sees alpha·known + sigma·noise outside the hole, z_t inside."""
    seen = []

    def watch(z_t, t):
        seen.append(z_t)
        return Prediction(z_t, z_t)

    known, mask = 10 + normal(7), jnp.zeros(SHAPE).at[:, 0].set(1.0)
    denoise = guidance.inpaint(watch, SCHEDULE, known, mask, KEYS)
    for t in (10.0, 10.0, 900.0):
        denoise(Z_T, jnp.asarray(t))
    np.testing.assert_array_equal(seen[0][:, 0], Z_T[:, 0])
    np.testing.assert_array_equal(seen[0], seen[1])  # noise belongs to the step
    low, high = (np.asarray(SCHEDULE.alpha_t(jnp.asarray(t)) * known[:, 1]) for t in (10.0, 900.0))
    np.testing.assert_allclose(seen[0][:, 1], low, atol=5 * SCHEDULE.sigma_t(jnp.asarray(10.0)))
    noise = (np.asarray(seen[2][:, 1]) - high) / float(SCHEDULE.sigma_t(jnp.asarray(900.0)))
    assert 0.1 < np.abs(noise).max() < 5
    pasted = guidance.paste(Z_T, known, mask)
    np.testing.assert_array_equal(pasted[:, 0], Z_T[:, 0])
    np.testing.assert_array_equal(pasted[:, 1], known[:, 1])


def test_inpainting_fills_the_hole_from_the_data():
    known, mask = jnp.full(SHAPE, 9.0), jnp.zeros(SHAPE).at[:, 0].set(1.0)
    exact = GAUSSIAN.denoiser(SCHEDULE)
    denoise = guidance.inpaint(exact, SCHEDULE, known, mask, KEYS)
    z_0 = guidance.paste(ddim(denoise, spacing("trailing", SCHEDULE, 20)), known, mask)
    np.testing.assert_array_equal(z_0[:, 1], 9.0)
    np.testing.assert_allclose(z_0[:, 0], 1.5, atol=5 * 0.4)


@pytest.mark.parametrize(("strength", "left"), [(1.0, 20), (0.5, 10), (0.0, 0), (0.3, 6)])
def test_image_to_image_runs_the_last_share_of_the_steps(strength, left):
    timesteps = spacing("trailing", SCHEDULE, 20)
    z_0 = jnp.full(SHAPE, 1.7)
    z_t, rest = guidance.image_to_image(SCHEDULE, z_0, timesteps, strength, KEYS)
    assert len(rest) == left + 1
    np.testing.assert_array_equal(rest, timesteps[20 - left :])
    alpha, sigma = SCHEDULE.alpha_t(rest[0]), SCHEDULE.sigma_t(rest[0])
    np.testing.assert_allclose(z_t, alpha * z_0, atol=5 * float(sigma) + 1e-6)
    if strength == 0.0:
        np.testing.assert_allclose(ddim(GAUSSIAN.denoiser(SCHEDULE), rest, z_t), z_0, atol=0.1)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_strength_outside_its_range_is_refused(strength):
    timesteps = spacing("trailing", SCHEDULE, 4)
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got"):
        guidance.image_to_image(SCHEDULE, Z_T, timesteps, strength, KEYS)


def test_callbacks_see_every_step_without_changing_the_result():
    timesteps = spacing("trailing", SCHEDULE, 5)
    steps, previews = [], []
    exact = GAUSSIAN.denoiser(SCHEDULE)
    watched = guidance.with_progress(exact, lambda t: steps.append(float(t)))
    watched = guidance.with_preview(watched, lambda t, z_0: previews.append(np.asarray(z_0)))
    plain = jax.jit(lambda: ddim(exact, timesteps))()
    np.testing.assert_allclose(jax.jit(lambda: ddim(watched, timesteps))(), plain, atol=1e-6)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(steps, reverse=True), timesteps[:-1], rtol=1e-6)
    assert len(previews) == 5 and all(p.shape == SHAPE for p in previews)
