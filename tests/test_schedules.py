import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from latent_diffusion.process.schedules import BETAS, CLEAN, make_schedule
from latent_diffusion.process.spacings import SPACINGS, spacing

LINEAR = make_schedule("linear", beta_start=0.0015, beta_end=0.0195)


def assert_printed(value, printed):
    """Equal to the last digit of `printed`, given that tables are rounded to float32."""
    digits = printed.lower().partition("e")
    exponent = int(digits[2] or 0) - len(digits[0].partition(".")[2])
    assert abs(float(value) - float(printed)) <= 0.5 * 10**exponent + 1e-7 * abs(float(printed))


# Fact sheet §12; start, end, then beta_0, beta_1, beta_499, beta_999, ᾱ_0, ᾱ_499, ᾱ_999, sigmas.
GOLDEN = """
.0001 .02 1e-4 1.0264836e-4 .0057221511 .02 .9999 .33318777 7.3341246e-4 .0100 36.9119
.0015 .0195 .0015 .0015078347 .007945157 .0195 .9985 .11584449 1.4230398e-4 .03876 83.8225
.0015 .0205 .0015 .0015081096 .0082631273 .0205 .9985 .108576 9.6910867e-5 .03876 101.5764
.0015 .0155 .0015 .0015066577 .0066539075 .0155 .9985 .15107742 6.6866517e-4 .03876 38.659
.0015 .015 .0015 .0015065004 .0064899532 .015 .9985 .15630709 8.1251847e-4 .03876 35.0677
.00085 .012 .00085 .00085469866 .004803793 .012 .99915 .27766965 .0046600985 .02917 14.6146
"""


@pytest.mark.parametrize("row", GOLDEN.strip().splitlines(), ids=lambda row: row[:11])
def test_golden_numbers_of_the_released_schedules(row):
    start, end, *betas_and_products, sigma_min, sigma_max = row.split()
    schedule = make_schedule("linear", beta_start=float(start), beta_end=float(end))
    for t, printed in zip((0, 1, 499, 999), betas_and_products[:4], strict=True):
        assert_printed(schedule.betas[t], printed)
    for t, printed in zip((0, 499, 999), betas_and_products[4:], strict=True):
        assert_printed(schedule.alphas_cumprod[t], printed)
    ratio = schedule.sigmas / schedule.alphas
    assert_printed(ratio[0], sigma_min)
    assert_printed(ratio[999], sigma_max)
    assert_printed(jnp.exp(-0.5 * schedule.log_snr[999]), sigma_max)


def test_golden_numbers_of_the_cosine_schedule():
    schedule = make_schedule("cosine")
    for t, printed in ((0, "4.128422e-5"), (499, ".00314589"), (998, ".7499994"), (999, ".999")):
        assert_printed(schedule.betas[t], printed)


def test_sqrt_and_sqrt_linear_betas():
    line = np.linspace(1e-4, 2e-2, 1000)
    np.testing.assert_allclose(make_schedule("sqrt_linear").betas, line, rtol=1e-6)
    np.testing.assert_allclose(make_schedule("sqrt").betas, line**0.5, rtol=1e-6)


def test_given_betas_take_precedence():
    schedule = make_schedule("cosine", betas=[0.1, 0.2])
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72], rtol=1e-6)


@pytest.mark.parametrize("name", [*BETAS, "rectified_flow"])
def test_tables_agree_with_each_other(name):
    schedule = make_schedule(name, num_timesteps=100)
    assert schedule.num_timesteps == 100
    assert np.all(np.diff(schedule.log_snr) < 0)
    share = schedule.alphas**2 / (schedule.alphas**2 + schedule.sigmas**2)
    np.testing.assert_allclose(share, schedule.alphas_cumprod, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(schedule.log_snr), schedule.alphas_cumprod, atol=1e-6)


def test_zero_terminal_snr():
    schedule = make_schedule("linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True)
    plain = make_schedule("linear", beta_start=0.00085, beta_end=0.012)
    assert schedule.alphas[-1] == schedule.alphas_cumprod[-1] == 0
    assert schedule.sigmas[-1] == 1
    np.testing.assert_allclose(schedule.alphas[0], plain.alphas[0], rtol=1e-6)
    assert np.all(np.isfinite(schedule.log_snr)) and np.all(np.diff(schedule.log_snr) < 0)
    assert schedule.alpha_t(999) == schedule.alpha_t(999.0) == 0


def test_rectified_flow_is_a_straight_line():
    schedule = make_schedule("rectified_flow", num_timesteps=10)
    np.testing.assert_allclose(schedule.alphas + schedule.sigmas, np.ones(10), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma_t(2.5), 0.35, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha_t(2.5), 0.65, rtol=1e-6)
    assert schedule.sigmas[-1] == 1


@pytest.mark.parametrize("t", [0, 1, 999, 0.0, 999.0])
def test_integer_timesteps_read_the_tables(t):
    assert LINEAR.alpha_t(t) == LINEAR.alphas[int(t)]
    assert LINEAR.sigma_t(t) == LINEAR.sigmas[int(t)]
    assert LINEAR.log_snr_t(t) == LINEAR.log_snr[int(t)]


def test_timestep_minus_one_is_clean_data():
    for t in (-1, -1.0, jnp.array([-1, -1])):
        assert np.all(LINEAR.alpha_t(t) == 1) and np.all(LINEAR.sigma_t(t) == 0)
        assert np.all(np.isposinf(LINEAR.log_snr_t(t)))


def test_fractional_timesteps_interpolate_log_sigma():
    t = jnp.array([[0.25, 10.5], [500.75, 998.1]])
    log_sigma = jnp.log(LINEAR.sigmas / LINEAR.alphas)
    expected = np.exp(np.interp(t, np.arange(1000), log_sigma))
    np.testing.assert_allclose(LINEAR.sigma_t(t) / LINEAR.alpha_t(t), expected, rtol=1e-5)
    np.testing.assert_allclose(LINEAR.sigma_t(t) ** 2 + LINEAR.alpha_t(t) ** 2, 1, rtol=1e-6)
    np.testing.assert_allclose(LINEAR.timestep_at(LINEAR.log_snr_t(t)), t, rtol=1e-4)


def test_methods_trace():
    t = jnp.arange(-1, 3)
    traced = jax.jit(lambda schedule, t: schedule.alpha_t(t))(LINEAR, t)
    np.testing.assert_array_equal(traced, LINEAR.alpha_t(t))


STEPS = [1, 2, 3, 7, 9, 27, 36, 50, 300, 400, 999, 1000]


@pytest.mark.parametrize("name", SPACINGS)
def test_any_number_of_steps_means_that_number(name):
    own = {"given": {"timesteps": [999, 500, 3]}, "lcm": {"distilled_steps": 1000}}.get(name, {})
    for num_steps in STEPS:
        for end in (CLEAN, 0):
            timesteps = np.asarray(spacing(name, LINEAR, num_steps, last=end, **own))
            assert timesteps.shape == (num_steps + 1,)
            assert timesteps[-1] == end
            assert np.all((timesteps[:-1] >= 0) & (timesteps <= 999)[:-1])
            assert np.all(np.diff(timesteps) <= 0)
            repeats = ("original", "original_quad", "open", "leading", "open_leading", "trailing")
            if name not in repeats and end == CLEAN:
                assert np.all(np.diff(timesteps) < 0)


def test_original_spacing():
    timesteps = spacing("original", LINEAR, 50)
    assert timesteps.dtype == jnp.int32
    np.testing.assert_array_equal(timesteps[:-1], np.arange(0, 1000, 20)[::-1] + 1)
    assert timesteps[-1] == 0
    assert spacing("original", LINEAR, 200)[0] == 996
    assert spacing("original", LINEAR, 250)[0] == 997


def test_original_quad_spacing():
    timesteps = spacing("original_quad", LINEAR, 50)
    assert timesteps[::-1][1:9].tolist() == [1, 1, 2, 3, 6, 9, 12, 17]
    assert timesteps[:2].tolist() == [801, 768] and timesteps[-1] == 0


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("uniform", {}, [999, 749, 500, 250, 0, -1]),
        ("linspace", {}, [999, 749.25, 499.5, 249.75, 0, -1]),
        ("open", {}, [999, 799, 599, 400, 200, -1]),
        ("uniform", {"last": 0}, [999, 799, 599, 400, 200, 0]),
        ("leading", {}, [800, 600, 400, 200, 0, -1]),
        ("leading", {"offset": 1}, [801, 601, 401, 201, 1, -1]),
        ("open_leading", {"offset": 1}, [831, 665, 499, 333, 167, -1]),
        ("trailing", {}, [999, 799, 599, 399, 199, -1]),
        ("quad", {}, [999, 562, 250, 62, 0, -1]),
        ("given", {"timesteps": [5, 900, 40, 300, 41.5]}, [900, 300, 41.5, 40, 5, -1]),
        ("lcm", {}, [999, 799, 599, 399, 199, -1]),
    ],
)
def test_spacings_of_five_steps(name, own, expected):
    timesteps = spacing(name, LINEAR, 5, **own)
    np.testing.assert_allclose(timesteps, expected, rtol=1e-6)
    integral = all(t == int(t) for t in expected)
    assert timesteps.dtype == (jnp.int32 if integral else jnp.float32)


def test_karras_spacing_is_even_in_the_root_of_sigma():
    timesteps = spacing("karras", LINEAR, 9)[:-1]
    roots = np.exp(-0.5 * LINEAR.log_snr_t(timesteps)) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=1e-3)
    square = np.exp(-0.5 * LINEAR.log_snr_t(spacing("karras", LINEAR, 9, rho=2.0)[:-1])) ** 0.5
    np.testing.assert_allclose(np.diff(square), np.diff(square).mean(), rtol=1e-3)


def test_beta_spacing_has_even_quantiles():
    sigmas = np.exp(-0.5 * LINEAR.log_snr_t(spacing("beta", LINEAR, 9)[:-1]))
    table = np.exp(-0.5 * np.asarray(LINEAR.log_snr, np.float64))
    share = scipy.stats.beta.cdf((sigmas - table[0]) / (table[-1] - table[0]), 0.6, 0.6)
    np.testing.assert_allclose(np.diff(share), -1 / 8, rtol=1e-2)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_curves_lie_within_another_spacing_or_given_bounds(name):
    for within in ("leading", "open_leading"):
        outer = np.round(spacing(within, LINEAR, 20, offset=3))
        steps = spacing(name, LINEAR, 20, within=within, offset=3)
        np.testing.assert_allclose(steps[np.array([0, -2, -1])], outer[np.array([0, -2, -1])])
    ended = spacing(name, LINEAR, 5, within="linspace", last=0)
    np.testing.assert_allclose(ended[jnp.array([0, -2, -1])], [999, 0, 0], atol=1e-3)
    bound = spacing(name, LINEAR, 5, sigma_min=0.1, sigma_max=5.0)
    ends = np.exp(-0.5 * LINEAR.log_snr_t(bound[jnp.array([0, -2])]))
    np.testing.assert_allclose(ends, [5.0, 0.1], rtol=1e-3)
    with pytest.raises(ValueError, match=r"sigma_max must lie in 0.0387\d* … 83.8\d*, .* got 90"):
        spacing(name, LINEAR, 5, sigma_max=90.0)


def test_schedules_of_karras_preconditioning():
    """Its network is told a quarter of the logarithm of sigma, and sees z of variance 1."""
    schedule = make_schedule("edm", 1000, 0.002, 80.0)
    t = jnp.array([0, 400.3, 999])
    sigma = np.geomspace(0.002, 80.0, 1000)[0] * (80.0 / 0.002) ** (np.asarray(t) / 999)
    np.testing.assert_allclose(schedule.time_t(t), 0.25 * np.log(sigma), rtol=1e-4)
    np.testing.assert_allclose(schedule.sigma_t(t) / schedule.alpha_t(t), sigma, rtol=1e-4)
    variance = schedule.alpha_t(t) ** 2 * 0.25 + schedule.sigma_t(t) ** 2
    np.testing.assert_allclose(variance, 1.0, rtol=1e-4)
    assert LINEAR.time_t(t) is t
    for ends in ((0.0015, 0.0195), (80.0, 0.002), (0.0, 80.0)):  # those of beta, for example
        with pytest.raises(ValueError, match=r"beta_start=.*; for Karras' schedule they are the l"):
            make_schedule("edm", 1000, *ends)


def test_exponential_spacing_is_even_in_log_snr():
    for end in (CLEAN, 0):
        timesteps = spacing("exponential", LINEAR, 9, last=end)
        steps = np.diff(LINEAR.log_snr_t(timesteps if end == 0 else timesteps[:-1]))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)


def test_ays_keeps_its_list_and_interpolates_others():
    assert spacing("ays", LINEAR, 10).tolist()[:3] == [999, 850, 736]
    longer = spacing("ays", LINEAR, 19)
    np.testing.assert_allclose(longer[:-1:2], spacing("ays", LINEAR, 10)[:-1], rtol=1e-5)


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_impossible_numbers_of_steps(num_steps):
    with pytest.raises(ValueError, match=rf"^num_steps must lie in 1 … 1000 .* got {num_steps}$"):
        spacing("uniform", LINEAR, num_steps)


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match=r"unknown spacing 'unifrom'; known: .*karras.*uniform"):
        spacing("unifrom", LINEAR, 5)
    with pytest.raises(ValueError, match=r"unknown noise schedule 'cos'; known: cosine, edm"):
        make_schedule("cos")
    with pytest.raises(ValueError, match=r"last must be -1 .* or 0 .*, got 3"):
        spacing("uniform", LINEAR, 5, last=3)
    with pytest.raises(ValueError, match=r"given timesteps must lie in 0 … 999"):
        spacing("given", LINEAR, 2, timesteps=[1000, 3])
    for own in ({"name": "given"}, {"name": "karras", "within": "given"}):
        with pytest.raises(ValueError, match="the spacing 'given' needs timesteps, a list of them"):
            spacing(schedule=LINEAR, num_steps=2, **own)
    assert spacing("given", LINEAR, 1, timesteps=999).tolist() == [999, -1]
    with pytest.raises(ValueError, match=r"num_steps must lie in 1 … 50"):
        spacing("lcm", LINEAR, 51)


@pytest.mark.parametrize("ends", [(-1e-4, 0.02), (1e-4, 2.0), (1e-4, float("nan"))])
def test_betas_are_shares(ends):
    with pytest.raises(ValueError, match=r"^beta_start=.*; expected 0 to 1$"):
        make_schedule("linear", 10, *ends)


@pytest.mark.parametrize("name", ["linear", "rectified_flow"])
def test_a_schedule_of_one_timestep_is_finite(name):
    schedule = make_schedule(name, 1)
    for array in jax.tree.leaves(schedule):
        assert np.isfinite(array).all() and len(array) == 1
    with pytest.raises(ValueError, match="zero_terminal_snr needs at least 2 timesteps"):
        make_schedule("linear", 1, zero_terminal_snr=True)


@pytest.mark.parametrize("name", ["edm", "ipndm", "rectified_flow"])
def test_a_schedule_without_betas_has_no_rescaled_ones(name):
    with pytest.raises(ValueError, match=f"the schedule '{name}' has none"):
        make_schedule(name, 10, 0.01, 80.0, zero_terminal_snr=True)
