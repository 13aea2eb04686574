import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from latent_diffusion.nets.posterior import DiagonalGaussian


def random_posterior(seed, batch=2, shape=(2, 3, 4)):
    moments = np.random.default_rng(seed).normal(size=(batch, *shape[:2], 2 * shape[2]))
    return DiagonalGaussian.from_moments(jnp.asarray(moments, jnp.float32))


def frozen(q):
    return scipy.stats.norm(np.asarray(q.mean, np.float64), np.exp(0.5 * np.float64(q.logvar)))


def test_moments_are_mean_then_clamped_log_variance():
    moments = jnp.stack([jnp.array([1.0, 2.0, -99.0, 99.0])] * 2).reshape(2, 1, 1, 4)
    q = DiagonalGaussian.from_moments(moments.astype(jnp.bfloat16))
    np.testing.assert_array_equal(q.mode()[0, 0, 0], [1, 2])
    np.testing.assert_array_equal(q.logvar[0, 0, 0], [-30, 20])
    np.testing.assert_allclose(q.std[0, 0, 0], np.exp([-15, 10]), rtol=1e-6)
    np.testing.assert_allclose(q.var[0, 0, 0], np.exp([-30, 20]), rtol=1e-6)
    assert q.mean.dtype == jnp.float32


def test_nll_is_minus_the_density_scipy_gives():
    q = random_posterior(0)
    x = q.mean[::-1] + 1
    np.testing.assert_allclose(q.nll(x), -frozen(q).logpdf(x).sum((1, 2, 3)), rtol=1e-5)


def test_kl_is_the_expected_log_ratio():
    """Exact by Gauss–Hermite quadrature: the log ratio is a quadratic polynomial."""
    q, p = random_posterior(0), random_posterior(1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    for other, density in [(p, frozen(p)), (None, scipy.stats.norm())]:
        expected = 0
        for node, weight in zip(nodes, weights, strict=True):
            x = np.float64(q.mean) + np.exp(0.5 * np.float64(q.logvar)) * node
            expected += weight * (frozen(q).logpdf(x) - density.logpdf(x)).sum((1, 2, 3))
        np.testing.assert_allclose(q.kl(other), expected, rtol=1e-5)
    np.testing.assert_array_equal(q.kl(q), 0)


def test_samples_have_the_moments_and_belong_to_their_keys():
    q, n = random_posterior(0, batch=1), 8000
    keys = jax.random.split(jax.random.key(2), n)
    many = DiagonalGaussian(jnp.repeat(q.mean, n, 0), jnp.repeat(q.logvar, n, 0))
    samples = np.asarray(many.sample(keys))
    np.testing.assert_allclose(samples.mean(0), q.mean[0], atol=5 * float(q.std.max()) / n**0.5)
    np.testing.assert_allclose(samples.std(0) / q.std[0], 1, atol=5 / (2 * n) ** 0.5)
    # An example alone, with its key, gets the sample it gets in the batch.
    np.testing.assert_allclose(q.sample(keys[7:8])[0], samples[7], rtol=1e-4, atol=1e-6)
