"""Samplers against data whose denoiser and probability flow are known in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_tables import filled
from test_schedules import assert_printed

from benchmarks.exact import Mixture
from latent_diffusion.core.rng import example_keys, normal_per_example
from latent_diffusion.core.types import lookup
from latent_diffusion.process import constraints
from latent_diffusion.process.diffusion import Prediction
from latent_diffusion.process.samplers import SAMPLERS, ddim_inversion
from latent_diffusion.process.samplers.first_order import ddim_noise
from latent_diffusion.process.samplers.table import run, steps
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import spacing

SCHEDULES = {
    "linear": make_schedule("linear", beta_start=0.0015, beta_end=0.0195),
    "zero_terminal_snr": make_schedule(
        "linear", beta_start=0.0015, beta_end=0.0195, zero_terminal_snr=True
    ),
    "rectified_flow": make_schedule("rectified_flow"),
}
LINEAR = SCHEDULES["linear"]
# Both have two components, so that one compiled program serves both.
GAUSSIAN = Mixture(jnp.array([1.5, 1.5]), jnp.array(0.4), jnp.array([0.5, 0.5]))
MIXTURE = Mixture(jnp.array([-1.0, 1.0]), jnp.array(0.5), jnp.array([0.3, 0.7]))
STOCHASTIC = {
    "ddpm",
    "euler_ancestral",
    "dpm2_ancestral",
    "dpm_solver_pp_2s_ancestral",
    "dpm_solver_pp_sde",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_3m_sde",
    "lcm",
    "tcd",
}
TWO_EVALUATIONS = {
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver_pp_2s_ancestral",
    "dpm_solver_pp_sde",
}
BATCH = 1024
KEYS = example_keys(jax.random.key(0), BATCH)
# Evenly spread quantiles, so that deterministic samplers have no sampling error.
QUANTILES = np.random.default_rng(0).permutation((np.arange(BATCH) + 0.5) / BATCH)
Z_T = jax.scipy.stats.norm.ppf(jnp.asarray(QUANTILES, jnp.float32)).reshape(BATCH, 1, 1, 1)


def consistency(mixture, schedule):
    """What a distilled network answers: where the flow leads (exact for one Gaussian)."""
    mean, std = mixture.moments()

    def denoise(z_t, t):
        alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
        z_0 = mean + std / jnp.hypot(alpha * std, sigma) * (z_t - alpha * mean)
        return Prediction(z_0, (z_t - alpha * z_0) / sigma)

    return denoise


@functools.cache
def compiled(name, **own):
    """sampler(mixture, schedule, timesteps, z_T, keys) -> z_0."""

    def sample(mixture, schedule, timesteps, z_T, keys):
        make = consistency if name == "lcm" else Mixture.denoiser
        return SAMPLERS[name](make(mixture, schedule), z_T, timesteps, schedule, keys, **own)

    return jax.jit(sample, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def looped(consistent=False, bound=None, follow=False):
    """run(table, mixture, schedule, z_T, keys) -> z_0, compiled once for all samplers."""

    def loop(table, mixture, schedule, z_T, keys):
        denoise = (consistency if consistent else Mixture.denoiser)(mixture, schedule)
        if bound is not None:
            denoise = constraints.clip(denoise, schedule, -bound, bound, recompute_eps=follow)
        return run(table, denoise, z_T, keys)

    return jax.jit(loop)


def levels(num_steps, schedule=LINEAR, end=-1):
    return spacing("exponential", schedule, num_steps, last=end).astype(jnp.float32)


def sample(name, mixture, timesteps, schedule=LINEAR, z_T=Z_T, keys=KEYS, **own):
    # A network that isn't distilled can't jump as far as trajectory consistency asks.
    own |= {"eta": 0.02} if name == "tcd" else {}
    table = filled(SAMPLERS[name].table(schedule, timesteps, **own))
    return looped(name == "lcm")(table, mixture, schedule, z_T, keys)


def many_levels(name, schedule=LINEAR):
    if name == "lcm":
        return spacing("lcm", schedule, 8)
    return levels(64 if name in TWO_EVALUATIONS else 128, schedule)


# ------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_reaches_the_right_moments(name, schedule):
    schedule = SCHEDULES[schedule]
    for mixture in (GAUSSIAN, MIXTURE):
        if name == "lcm" and mixture is MIXTURE:
            continue  # its consistency function above is the Gaussian's
        mean, std = mixture.moments()
        z_0 = sample(name, mixture, many_levels(name, schedule), schedule)
        assert z_0.shape == Z_T.shape
        exact = ORDERS.get(name, 1) > 1  # 128 first-order steps still lack some of the std
        np.testing.assert_allclose(jnp.mean(z_0), mean, atol=(0.02 if exact else 0.1) * std)
        np.testing.assert_allclose(jnp.std(z_0), std, rtol=0.02 if exact else 0.08)


@pytest.mark.parametrize("schedule", ["zero_terminal_snr", "rectified_flow"])
@pytest.mark.parametrize("name", sorted({*SAMPLERS} - STOCHASTIC))
def test_few_steps_from_pure_noise_keep_the_mean(name, schedule):
    """There the latent says nothing of eps: a first step must follow z_0, as DDIM's does."""
    schedule = SCHEDULES[schedule]
    for count in (2, 4, 8):
        timesteps = spacing("trailing", schedule, count).astype(jnp.float32)
        assert schedule.alpha_t(timesteps[0]) == 0
        z_0, first_order = (sample(n, GAUSSIAN, timesteps, schedule) for n in (name, "ddim"))
        np.testing.assert_allclose(jnp.mean(z_0), 1.5, atol=5e-3)
        std = float(jnp.std(z_0))
        assert 0.98 * float(jnp.std(first_order)) < std < 1.03 * 0.4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plms_that_extrapolates_v_converges_on_every_schedule(schedule):
    schedule = SCHEDULES[schedule]
    timesteps = spacing("trailing", schedule, 100).astype(jnp.float32)
    by_v = sample("plms", GAUSSIAN, timesteps, schedule, extrapolated="v")
    by_eps = sample("plms", GAUSSIAN, timesteps, schedule)
    np.testing.assert_allclose(jnp.mean(by_v), 1.5, atol=0.03)
    np.testing.assert_allclose(jnp.std(by_v), jnp.std(by_eps), rtol=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_own_start_and_key_only(name):
    """Images moved to other places, among other companions, are the same to the bit."""
    order = np.random.default_rng(0).permutation(BATCH)
    other = Z_T.at[: BATCH // 2].add(1.0)
    timesteps = many_levels(name)
    z_0 = sample(name, GAUSSIAN, timesteps)
    again = sample(name, GAUSSIAN, timesteps, z_T=other[order], keys=KEYS[order])
    kept = order >= BATCH // 2
    np.testing.assert_array_equal(again[kept], z_0[order[kept]])
    fresh = sample(name, GAUSSIAN, timesteps, keys=KEYS[::-1])
    assert bool(jnp.any(fresh != z_0)) == (name in STOCHASTIC)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(name):
    """And the sampler itself agrees with its table run as above."""
    timesteps = spacing("original", LINEAR, 5)
    many = sample(name, GAUSSIAN, timesteps)
    own = {"eta": 0.02} if name == "tcd" else {}
    few = compiled(name, **own)(GAUSSIAN, LINEAR, timesteps, Z_T[7:9], KEYS[7:9])
    np.testing.assert_allclose(few, many[7:9], atol=2e-5)


# ---------------------------------------------------------------------------------- convergence

ORDERS = {
    "ddim": 1,
    "plms": 2,
    "euler": 1,
    "heun": 2,
    "dpm2": 2,
    "ipndm": 2,
    "lms": 4,  # reached slowly, after its start of lower order
    "dpm_solver_2m": 2,
    "dpm_solver_3m": 2,
    "dpm_solver_pp_2m": 2,
    "dpm_solver_pp_singlestep": 2,
    "unipc": 3,  # the corrector adds one
    "deis": 2,
}


def test_every_deterministic_sampler_has_an_order():
    assert set(ORDERS) == set(SAMPLERS) - STOCHASTIC


@functools.cache
def exact_flow():
    return jax.jit(lambda z: MIXTURE.flow(LINEAR, z, 999, 0))(Z_T)


@pytest.mark.parametrize("name", ORDERS)
def test_converges_at_its_order(name):
    errors = []
    for num_steps in (32, 128) if name not in TWO_EVALUATIONS else (16, 64):
        z = sample(name, MIXTURE, levels(num_steps, end=0))
        errors.append(float(jnp.sqrt(jnp.mean((z - exact_flow()) ** 2))))
    slope = math.log(errors[0] / errors[1]) / math.log(4)
    assert ORDERS[name] - 0.5 < slope < ORDERS[name] + 0.3, errors


# ------------------------------------------------------------------------- constraints on z_0


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_constraint_on_z_0_reaches_the_result(name):
    """Through eps, where the sampler steps with nothing else."""
    timesteps = spacing("lcm", LINEAR, 8) if name == "lcm" else levels(32)
    table, follow = filled(SAMPLERS[name].table(LINEAR, timesteps)), SAMPLERS[name].by_eps
    free = looped(name == "lcm")(table, MIXTURE, LINEAR, Z_T, KEYS)
    bound = looped(name == "lcm", 0.2, follow)(table, MIXTURE, LINEAR, Z_T, KEYS)
    assert jnp.max(jnp.abs(free)) > 1.5 and jnp.max(jnp.abs(bound)) < 0.21


# ------------------------------------------------------------------------------ number of steps


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluates_the_network_where_it_says(name, num_steps):
    timesteps = spacing("original", LINEAR, num_steps)
    table = SAMPLERS[name].table(LINEAR, timesteps)
    for coefficients in jax.tree.leaves(table):
        assert np.all(np.isfinite(coefficients))
    seen, asked = table.t.tolist(), timesteps[:-1].tolist()
    if name == "plms":
        again = asked[:1] if num_steps == 1 else asked[1:2]
        assert seen == [asked[0], *again, *asked[1:]]
    elif name in TWO_EVALUATIONS:
        assert seen[::2] == asked and len(seen) == 2 * num_steps - 1
        assert all(
            a >= t >= b - 0.01 for a, t, b in zip(asked, seen[1::2], asked[1:], strict=False)
        )
    else:
        assert seen == asked


@pytest.mark.parametrize("name", SAMPLERS)
def test_repeated_timesteps_do_no_harm(name):
    """CompVis' quad spacing visits t = 1 twice; S = T of its uniform one repeats 999."""
    timesteps = jnp.array([999, 999, 700, 500, 300, 1, 1, 0])
    z_0 = sample(name, GAUSSIAN, timesteps)
    assert np.all(np.isfinite(z_0)) and np.all(np.abs(z_0 - 1.5) < 20)


# -------------------------------------------------------------- the original LDM


def numbers(S=50, spacing="original"):
    """DDIM's constants in the original, float64: timesteps, a, a_prev."""
    bar = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    t = np.arange(0, 1000, 1000 // S) + 1
    if spacing == "original_quad":
        t = (np.linspace(0, np.sqrt(800), S) ** 2).astype(int) + 1
    return t, bar[t], np.append(bar[0], bar[t[:-1]])


def test_golden_numbers_of_ddim():
    t, a, a_prev = numbers()
    here, there = steps(LINEAR, spacing("original", LINEAR, 50))
    np.testing.assert_allclose(here.t[::-1], t)
    np.testing.assert_allclose(here.alpha[::-1] ** 2, a, rtol=1e-5)
    np.testing.assert_allclose(there.alpha[::-1] ** 2, a_prev, rtol=1e-5)
    noise = ddim_noise(here, there)[::-1][jnp.array([0, 1, 25, 49])]
    np.testing.assert_allclose(noise, [0.02743209, 0.0524426, 0.37680537, 0.56113833], rtol=3e-6)
    for t, printed in (
        (1, ".99699443"),
        (981, "2.01956e-4"),
        (0, ".9985"),
        (961, "2.947856e-4"),
    ):
        assert_printed(LINEAR.alphas_cumprod[t], printed)


def eps_float64(x, a):
    """E[eps | x] for the Gaussian."""
    return np.sqrt(1 - a) * (x - np.sqrt(a) * 1.5) / (0.16 * a + 1 - a)


def original_ddim(x, eta, noises, *which):
    _, a, a_prev = numbers(*which)
    for i, k in enumerate(reversed(range(len(a)))):
        e = eps_float64(x, a[k])
        sigma = eta * np.sqrt((1 - a_prev[k]) / (1 - a[k]) * (1 - a[k] / a_prev[k]))
        x_0 = (x - np.sqrt(1 - a[k]) * e) / np.sqrt(a[k])
        x = np.sqrt(a_prev[k]) * x_0 + np.sqrt(1 - a_prev[k] - sigma**2) * e + sigma * noises(i)
    return x


def original_plms(x, S):
    _, a, a_prev = numbers(S)
    past = []

    def move(x, e, k):
        x_0 = (x - np.sqrt(1 - a[k]) * e) / np.sqrt(a[k])
        return np.sqrt(a_prev[k]) * x_0 + np.sqrt(1 - a_prev[k]) * e

    for k in reversed(range(S)):
        e = eps_float64(x, a[k])
        if len(past) == 0:
            mean = (e + eps_float64(move(x, e, k), a[k - 1])) / 2
        elif len(past) == 1:
            mean = (3 * e - past[-1]) / 2
        elif len(past) == 2:
            mean = (23 * e - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            mean = (55 * e - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        past.append(e)
        x = move(x, mean, k)
    return x


def original_ddpm(x, noises):
    bar = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    for i, t in enumerate(range(999, -1, -1)):
        before = bar[t - 1] if t else 1.0
        x_0 = (x - np.sqrt(1 - bar[t]) * eps_float64(x, bar[t])) / np.sqrt(bar[t])
        mean = betas[t] * np.sqrt(before) / (1 - bar[t]) * x_0
        mean += (1 - before) * np.sqrt(1 - betas[t]) / (1 - bar[t]) * x
        variance = max(betas[t] * (1 - before) / (1 - bar[t]), 1e-20)
        x = mean + (t > 0) * np.sqrt(variance) * noises(i)
    return x


START = Z_T[:4]


def noise_of(i):
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS[:4], i)
    return np.asarray(normal_per_example(keys, START.shape[1:]), np.float64)


def ours(name, timesteps, **own):
    return compiled(name, **own)(GAUSSIAN, LINEAR, timesteps, START, KEYS[:4])


@pytest.mark.parametrize(
    ("eta", "num_steps", "name"),
    [(0.0, 10, "original"), (0.0, 20, "original"), (0.0, 50, "original"), (1.0, 50, "original"),
     (0.4, 20, "original_quad")],
)  # fmt: skip
def test_trajectory_of_the_original_ddim(eta, num_steps, name):
    z_0 = ours("ddim", spacing(name, LINEAR, num_steps), eta=eta)
    start = np.asarray(START, np.float64)
    expected = original_ddim(start, eta, noise_of, num_steps, name)
    np.testing.assert_allclose(z_0, expected, atol=1e-5)


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_trajectory_of_the_original_plms(num_steps):
    z_0 = ours("plms", spacing("original", LINEAR, num_steps))
    expected = original_plms(np.asarray(START, np.float64), num_steps)
    np.testing.assert_allclose(z_0, expected, atol=1e-5)


def test_trajectory_of_the_original_ddpm():
    z_0 = ours("ddpm", spacing("uniform", LINEAR, 1000))
    noises = jax.vmap(
        lambda i: normal_per_example(
            jax.vmap(jax.random.fold_in, (0, None))(KEYS[:4], i), START.shape[1:]
        )
    )(jnp.arange(1000))
    expected = original_ddpm(
        np.asarray(START, np.float64), lambda i: np.asarray(noises[i], np.float64)
    )
    np.testing.assert_allclose(z_0, expected, atol=1e-4)


# ------------------------------------------------------------------------------------- options


def test_ddpm_is_ddim_with_its_noise():
    timesteps = levels(50)
    np.testing.assert_allclose(ours("ddpm", timesteps), ours("ddim", timesteps, eta=1.0), atol=1e-5)


def test_options_of_ddpm():
    timesteps = levels(50)
    plain = ours("ddpm", timesteps)
    np.testing.assert_allclose(ours("ddpm", timesteps, large_variance=0.0), plain)
    wide = [ours("ddpm", timesteps, large_variance=v) for v in (0.5, 1.0)]
    assert jnp.max(jnp.abs(wide[0] - plain)) > 0.01
    assert jnp.max(jnp.abs(wide[1] - wide[0])) > 0.01
    still = ours("ddpm", timesteps, temperature=0.0)
    other = SAMPLERS["ddpm"](
        GAUSSIAN.denoiser(LINEAR), START, timesteps, LINEAR, KEYS[4:8], temperature=0.0
    )
    np.testing.assert_allclose(still, other, atol=1e-6)


def test_temperature_of_ddim_scales_its_noise():
    timesteps = jnp.array([500.0, 300.0])

    def one_step(temperature):
        return ours("ddim", timesteps, eta=1.0, temperature=temperature)

    still, half, full = one_step(0.0), one_step(0.5), one_step(1.0)
    np.testing.assert_allclose(full - still, 2 * (half - still), atol=1e-6)
    assert jnp.max(jnp.abs(full - still)) > 0.1


def test_dropout_of_ddims_noise_keeps_its_mean():
    timesteps = jnp.array([500.0, 300.0])

    def noise(**own):
        return np.ravel(SAMPLERS["ddim"](still, Z_T, timesteps, LINEAR, KEYS, eta=1.0, **own))

    def still(z_t, t):
        return Prediction(0 * z_t, 0 * z_t)

    whole, left = noise(), noise(noise_dropout=0.75)
    np.testing.assert_allclose(left[left != 0], 4 * whole[left != 0], rtol=1e-5)
    assert abs(np.mean(left == 0) - 0.75) < 0.06
    assert abs(np.mean(left)) < 0.25 * np.std(whole)  # four standard errors: none is preferred


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_without_noise_the_sde_solvers_are_the_ode_solvers(solver_type):
    timesteps = levels(20)
    ode = ours("dpm_solver_pp_2m", timesteps, solver_type=solver_type)
    sde = ours("dpm_solver_pp_2m_sde", timesteps, solver_type=solver_type, eta=0.0)
    np.testing.assert_array_equal(ode, sde)
    third = ours("dpm_solver_pp_3m_sde", timesteps, solver_type=solver_type, eta=0.0)
    flow = GAUSSIAN.flow(LINEAR, START, 999, -1)
    assert jnp.max(jnp.abs(third - flow)) < 0.02


@pytest.mark.parametrize(
    "name", ["euler_ancestral", "dpm2_ancestral", "dpm_solver_pp_2s_ancestral", "dpm_solver_pp_sde"]
)
def test_ancestral_samplers_without_noise_follow_the_flow(name):
    z_0 = SAMPLERS[name](GAUSSIAN.denoiser(LINEAR), START, levels(64), LINEAR, None, eta=0.0)
    np.testing.assert_allclose(z_0, GAUSSIAN.flow(LINEAR, START, 999, -1), atol=0.03)


def test_no_step_adds_more_noise_than_its_level_has():
    table = SAMPLERS["euler_ancestral"].table
    noise = {eta: table(LINEAR, levels(8), eta=eta).noise for eta in (1.0, 3.0)}
    sigma = LINEAR.sigma_t(levels(8)[1:])
    assert (noise[1.0] <= sigma).all() and (noise[1.0][:-1] > 0).all()
    np.testing.assert_allclose(noise[3.0], jnp.minimum(3 * noise[1.0], sigma), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["euler_ancestral", "dpm2_ancestral", "dpm_solver_pp_2s_ancestral"]
)
def test_a_last_step_to_a_noisy_level_draws_noise(name):
    """Of black pictures only their noise is left, whose deviation is that of the level."""

    def black(z_t, t):
        return Prediction(0 * z_t, z_t / LINEAR.sigma_t(t))

    timesteps = jnp.array([900.0, 600.0, 300.0])
    start = LINEAR.sigma_t(timesteps[0]) * Z_T
    got = SAMPLERS[name](black, start, timesteps, LINEAR, KEYS)
    np.testing.assert_allclose(np.std(got), LINEAR.sigma_t(timesteps[-1]), rtol=0.08)


@pytest.mark.parametrize(
    ("name", "orders"),
    [
        ("lms", (1, 2, 3)),
        ("deis", (1, 3, 4)),
        ("unipc", (1, 3)),
        ("dpm_solver_pp_singlestep", (1, 2, 3)),
    ],
)
def test_order_option(name, orders):
    timesteps = levels(16, end=0)
    flow = GAUSSIAN.flow(LINEAR, START, 999, 0)
    errors = {
        order: float(jnp.max(jnp.abs(ours(name, timesteps, order=order) - flow)))
        for order in orders
    }
    assert sorted(errors.values(), reverse=True) == [errors[order] for order in orders]


@pytest.mark.parametrize("name", ["dpm_solver_2m", "dpm_solver_3m", "dpm_solver_pp_2m"])
def test_a_last_step_of_first_order_sees_the_last_prediction_alone(name):
    timesteps = levels(6, end=0)
    for euler in (False, True):
        fields = {"lower_order_final": False, "euler_at_final": euler}
        table = SAMPLERS[name].table(LINEAR, timesteps, **fields)
        weights = np.asarray(table.z_0 if "_pp_" in name else table.eps)
        assert np.any(weights[-1, 1:] != 0) != euler and np.all(weights[-2, 1:] != 0)


def test_steps_of_third_order_are_those_of_k_diffusion():
    """Its DPM-Solver++(3M) without noise, for estimates of z_0 of the last three steps."""
    timesteps = levels(6, end=0)
    table = SAMPLERS["dpm_solver_pp_3m_sde"].table(LINEAR, timesteps, eta=0.0)
    lam = np.asarray(LINEAR.log_snr_t(timesteps), np.float64) / 2
    for i in range(2, 6):
        h, h_1, h_2 = lam[i + 1] - lam[i], lam[i] - lam[i - 1], lam[i - 1] - lam[i - 2]
        x = np.eye(3)  # the estimate here, the one before, the one before that
        d_0, d_1 = (x[0] - x[1]) * h / h_1, (x[1] - x[2]) * h / h_2
        slope = d_0 + (d_0 - d_1) * h_1 / (h_1 + h_2)
        curve = (d_0 - d_1) * h / (h_1 + h_2)
        phi_2 = np.expm1(-h) / h + 1
        want = -np.expm1(-h) * x[0] + phi_2 * slope - (phi_2 / h - 0.5) * curve
        got = table.z_0[i] / LINEAR.alpha_t(timesteps[i + 1])
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)


def test_ipndm_goes_on_with_four_predictions():
    eps = np.asarray(SAMPLERS["ipndm"].table(LINEAR, levels(8, end=0)).eps)
    adams = np.array(
        [[24, 0, 0, 0], [36, -12, 0, 0], [23 * 2, -16 * 2, 5 * 2, 0], [55, -59, 37, -9]]
    )
    want = adams[[0, 1, 2, 3, 3, 3, 3, 3]] / 24
    np.testing.assert_allclose(eps / eps.sum(1, keepdims=True), want, rtol=1e-4, atol=1e-6)


def test_a_last_group_is_completed_in_first_order_unless_that_is_unwanted():
    tables = [
        SAMPLERS["dpm_solver_pp_singlestep"].table(
            LINEAR, levels(4, end=0), lower_order_final=falls
        )
        for falls in (True, False)
    ]
    # Where a step returns to the start of its group.
    assert [table.keep.tolist() for table in tables] == [[0, 1, 0, 0], [0, 1, 0, 1]]


def test_groups_have_at_most_three_steps():
    with pytest.raises(ValueError, match=r"order=4 of dpm_solver_pp_singlestep must be 1, 2 or 3"):
        ours("dpm_solver_pp_singlestep", levels(16, end=0), order=4)


def test_consistency_sampling_mixes_in_its_input():
    timesteps = jnp.array([10.0, -1.0])
    scaled = 10 * 0.1
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    z_0 = consistency(GAUSSIAN, LINEAR)(START, jnp.array(10.0)).z_0
    answer = ours("lcm", timesteps, timestep_scaling=0.1)
    np.testing.assert_allclose(answer, out * z_0 + skip * START, rtol=1e-4)
    wider = ours("lcm", timesteps, timestep_scaling=0.1, sigma_data=1.0)
    np.testing.assert_allclose(wider, START / 2 + z_0 / math.sqrt(2), rtol=1e-4)
    noise = SAMPLERS["lcm"].table(LINEAR, jnp.array([500, 300, 0])).noise
    np.testing.assert_array_equal(noise, [LINEAR.sigmas[300], 0])  # none after the last step


def test_trajectory_consistency_without_noise_is_ddim_at_whole_timesteps():
    timesteps = spacing("leading", LINEAR, 10)
    still = ours("tcd", timesteps, eta=0.0)
    np.testing.assert_allclose(still, ours("ddim", timesteps), atol=1e-5)
    table = SAMPLERS["tcd"].table(LINEAR, timesteps, eta=0.4)
    below = LINEAR.alpha_t(jnp.floor(0.6 * timesteps[1:-1]))
    renoised = (LINEAR.alpha_t(timesteps[1:-1]) / below) ** 2
    np.testing.assert_allclose(table.noise[:-1] ** 2, 1 - renoised, rtol=1e-3)
    assert table.noise[-1] == 0


def test_a_step_without_correction_is_the_predictors_alone():
    timesteps = levels(8, end=0)
    free = SAMPLERS["unipc"].table(LINEAR, timesteps, disable_corrector=tuple(range(8)))
    assert not np.any(free.correction) and np.all(free.restart == 1)
    one = SAMPLERS["unipc"].table(LINEAR, timesteps, disable_corrector=(2,))
    assert one.restart.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def test_inversion_leads_to_the_flow_and_back_at_first_order():
    """Both are Euler steps: a quarter of the step size leaves a quarter of the error."""
    image = 1.5 + 0.4 * START
    exact = GAUSSIAN.flow(LINEAR, image, -1, 999)
    there, back = [], []
    for num_steps in (100, 400):
        timesteps = levels(num_steps)
        z_T = ddim_inversion(GAUSSIAN.denoiser(LINEAR), image, timesteps, LINEAR)
        again = SAMPLERS["ddim"](GAUSSIAN.denoiser(LINEAR), z_T, timesteps, LINEAR)
        there.append(float(jnp.abs(z_T - exact).max()))
        back.append(float(jnp.abs(again - image).max()))
    assert 3 < there[0] / there[1] < 5, there
    assert 3 < back[0] / back[1] < 5, back


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_samplers_ask_for_keys(name):
    with pytest.raises(ValueError, match="draws noise: give it rng, one key per image"):
        SAMPLERS[name](GAUSSIAN.denoiser(LINEAR), START, levels(2), LINEAR, None)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown sampler 'dimm'; known: ddim, ddpm, deis"):
        lookup(SAMPLERS, "dimm", "sampler")
    with pytest.raises(ValueError, match="unknown solver_type 'mid'; known: heun, midpoint"):
        ours("dpm_solver_pp_2m", levels(2), solver_type="mid")


def test_the_convergence_picture_is_drawn(tmp_path, monkeypatch):
    from benchmarks import convergence as plot

    assert set(plot.DETERMINISTIC) == set(ORDERS) - {"euler"}  # which is ddim
    monkeypatch.setattr(plot, "DETERMINISTIC", ("ddim",))
    plot.draw(tmp_path / "a.png", (2, 4))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
