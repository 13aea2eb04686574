"""Drawing codes: what can be drawn, what is masked again, where a window lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.process import decoding

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))


def kept(**options):
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    return np.flatnonzero(np.isfinite(decoding.filtered(LOGITS, **options)[0])).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1.0}, [1]),
        ({"top_k": 3.0}, [1, 3, 4]),
        ({"top_k": 9.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.86}, [0, 1, 3, 4]),
        # Of the first three (0.85 together) the first two have 0.65 / 0.85 = 0.76.
        ({"top_k": 3.0, "top_p": 0.75}, [1, 3]),
        ({"top_k": 3.0, "top_p": 0.77}, [1, 3, 4]),
        # At half the temperature probabilities are squared: 0.16 of 0.275 is 0.58.
        ({"top_p": 0.57, "temperature": 0.5}, [1]),
        ({"top_p": 0.57, "temperature": 0.0}, [1]),
    ],
)
def test_the_likeliest_codes_can_be_drawn(options, expected):
    assert kept(**options) == expected


def test_kept_logits_are_as_they_were():
    got = decoding.filtered(LOGITS, 1.0, 3.0, None)[0]
    np.testing.assert_array_equal(got[jnp.array([1, 3, 4])], LOGITS[0, jnp.array([1, 3, 4])])


def test_draws_have_the_probabilities_at_the_temperature():
    gumbel = jax.random.gumbel(jax.random.key(0), (20_000, 5))
    for temperature in (1.0, 0.5):
        share = np.bincount(decoding.drawn(LOGITS, gumbel, temperature), minlength=5) / 20_000
        weights = np.exp(LOGITS[0]) ** (1 / temperature)
        np.testing.assert_allclose(share, weights / weights.sum(), atol=0.012)
    assert set(decoding.drawn(LOGITS, gumbel, 0.0).tolist()) == {1}


def test_guidance_goes_beyond_the_condition():
    conditional, unconditional = jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2))
    for scale, want in ((1.0, 1), (0.0, 0), (3.0, 3)):
        np.testing.assert_allclose(decoding.guided(conditional, unconditional, scale), want)


def test_the_masked_share_is_a_quarter_of_a_cosine():
    got = [float(decoding.masked_share(x)) for x in (0.0, 1 / 3, 0.5, 1.0)]
    np.testing.assert_allclose(got, [1, 3**0.5 / 2, 0.5**0.5, 0], atol=1e-6)


def test_the_least_certain_of_the_unknown_are_masked_again():
    log_probs = jnp.array([[-3.0, -1.0, -9.0, -2.0, -4.0]])
    unknown = jnp.array([[True, True, False, True, True]])

    def again(count, temperature=0.0):
        gumbel = jnp.array([[0.0, -9.0, -50.0, 0.0, 0.0]])
        mask = decoding.remasked(log_probs, gumbel, unknown, jnp.array([count]), temperature)
        return np.flatnonzero(mask[0]).tolist()

    assert [again(n) for n in (0, 1, 2, 3, 4)] == [[4], [4], [0, 4], [0, 3, 4], [0, 3, 4]]
    assert again(1, temperature=1.0) == [1]
    noisy = decoding.remasked(log_probs, jnp.full((1, 5), 9.0), unknown, jnp.array([2]), 1.0)
    assert np.flatnonzero(noisy[0]).tolist() == [0, 4]  # even if all unknown codes are certain
    nothing = decoding.remasked(log_probs, log_probs, ~unknown & unknown, jnp.array([2]), 1.0)
    assert not nothing.any()


@pytest.mark.parametrize("size", [16, 17, 20, 32])
def test_a_window_stops_at_the_borders(size):
    """Literally as scripts/sample_conditional.py of taming-transformers, windows of 16."""
    for i in range(size):
        local = i if i <= 8 else 16 - (size - i) if size - i < 8 else 8
        assert decoding.local_place(i, size, 16) == local
        assert i - local >= 0 and i - local + 16 <= size
