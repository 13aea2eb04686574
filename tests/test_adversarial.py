import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.nets.losses.adversarial import (
    D_LOSSES,
    adaptive_weight,
    gate,
    generator_loss,
    hinge_d_loss,
    vanilla_d_loss,
)

REAL, FAKE = jnp.array([[-1.0, 0.5], [2.0, 1.0]]), jnp.array([[0.5, -2.0], [-1.0, 0.0]])


def test_hinge_by_hand():
    # relu(1 − real): 2, .5, 0, 0;  relu(1 + fake): 1.5, 0, 0, 1.
    np.testing.assert_allclose(hinge_d_loss(REAL, FAKE), 0.5 * (2.5 / 4 + 2.5 / 4))


def test_vanilla_is_half_the_two_cross_entropies():
    def bce(logits, label):
        p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
        return -np.mean(label * np.log(p) + (1 - label) * np.log(1 - p))

    expected = 0.5 * (bce(REAL, 1) + bce(FAKE, 0))
    np.testing.assert_allclose(vanilla_d_loss(REAL, FAKE), expected, rtol=1e-6)
    assert np.isfinite(vanilla_d_loss(jnp.array([-200.0]), jnp.array([200.0])))


@pytest.mark.parametrize("name", D_LOSSES)
def test_players_pull_in_opposite_directions(name):
    """D wants real logits up and fake ones down; the generator wants the fake ones up."""
    zeros = jnp.zeros(3)
    d_real, d_fake = jax.grad(D_LOSSES[name], (0, 1))(zeros, zeros)
    assert (d_real < 0).all() and (d_fake > 0).all()
    np.testing.assert_allclose(jax.grad(generator_loss)(FAKE), -0.25)


def test_adaptive_weight_is_a_clipped_constant_ratio_of_norms():
    rec, adv = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [2.0]])
    np.testing.assert_allclose(adaptive_weight(rec, adv), 5 / (2 + 1e-4), rtol=1e-6)
    assert adaptive_weight(rec, 0 * adv) == 1e4  # 5 / 1e-4 is more than the maximum
    assert adaptive_weight(rec, adv, maximum=2.0) == 2.0
    assert adaptive_weight(0 * rec, adv) == 0
    np.testing.assert_array_equal(jax.grad(adaptive_weight)(rec, adv), 0.0)
    np.testing.assert_array_equal(jax.grad(adaptive_weight)(0 * rec, 0 * adv), 0.0)  # no NaN


def test_gate_opens_at_start_and_stays_open():
    steps = jnp.array([0, 49, 50, 51, 10**7])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda s: gate(s, 50)))(steps), [0, 0, 1, 1, 1])
    assert gate(0, 0) == 1
    np.testing.assert_allclose(
        [gate(s, 50, ramp_steps=4) for s in (49, 50, 51, 52, 53, 54)],
        [0, 0.25, 0.5, 0.75, 1, 1],
    )
