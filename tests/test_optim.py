"""Optimisers, learning-rate curves and the parameter average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from latent_diffusion.optimisation.micro_batches import value_and_grad_in_parts
from latent_diffusion.optimisation.optimizers import (
    LR_SCHEDULES,
    ema_update,
    learning_rate_schedule,
    make_optimizer,
)

PARAMS = {"unet": {"kernel": jnp.ones(3), "bias": jnp.ones(2)}, "text": {"kernel": jnp.ones(2)}}


def _config(**fields):
    config = default.get_config().optimizer
    config.update(fields)
    return config


def _one_update(config, grads):
    tx = make_optimizer(config, 100)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return updates


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_learning_rate_warms_up_to_its_peak_and_ends_where_it_should(name):
    config = _config(schedule=name, learning_rate=2.0, warmup_steps=10, end_factor=0.1)
    curve = learning_rate_schedule(config, 110)
    assert float(curve(5)) == pytest.approx(1.0)
    assert float(curve(10)) == pytest.approx(2.0)
    assert float(curve(110)) == pytest.approx(2.0 if name == "constant" else 0.2)
    middle = {"constant": 2.0, "cosine": 1.1, "linear": 1.1}[name]
    assert float(curve(60)) == pytest.approx(middle)


def test_adamw_is_the_textbook_first_step():
    grads = jax.tree.map(lambda p: 0.5 * p, PARAMS)
    config = _config(learning_rate=0.1, weight_decay=0.2, no_decay=("bias",))
    updates = _one_update(config, grads)
    # Bias-corrected Adam moves by the sign of the gradient; decay adds 0.2 · p.
    np.testing.assert_allclose(updates["unet"]["kernel"], -0.1 * 1.2, rtol=1e-5)
    np.testing.assert_allclose(updates["unet"]["bias"], -0.1, rtol=1e-5)


def test_frozen_paths_stay_bitwise_and_have_no_slots():
    config = _config(frozen=("^text/",), learning_rate=0.1)
    tx = make_optimizer(config, 100)
    state = tx.init(PARAMS)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    np.testing.assert_array_equal(after["text"]["kernel"], PARAMS["text"]["kernel"])
    assert float(after["unet"]["kernel"][0]) != 1.0
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(moments) == [(2,), (2,), (3,), (3,)]  # two each for unet's kernel and bias


def test_gradients_are_clipped_by_their_global_norm():
    config = _config(name="adam", grad_clip=1.0, eps=1.0, b1=0.0, b2=0.0, learning_rate=1.0)
    big, bigger = (
        _one_update(config, jax.tree.map(lambda p: scale * p, PARAMS))  # noqa: B023
        for scale in (1e3, 1e5)
    )
    for a, b in zip(jax.tree.leaves(big), jax.tree.leaves(bigger), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"unknown optimizer\.name 'lion'; known: adam, adamw"):
        make_optimizer(_config(name="lion"), 1)
    with pytest.raises(ValueError, match=r"unknown optimizer\.schedule 'step'; known: "):
        make_optimizer(_config(schedule="step"), 1)


@pytest.mark.parametrize(("n", "decay"), [(1, 0.1818), (2, 0.25), (10, 0.55), (1000, 0.9911)])
def test_ema_decay_warms_up_as_the_reference(n, decay):
    ema = ema_update(jnp.ones(()), jnp.zeros(()), jnp.asarray(n - 1), 0.9999)
    assert float(ema) == pytest.approx(decay, abs=5e-5)


def test_micro_batches_give_the_gradient_of_the_whole():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)

    def loss(w, x):
        each = jnp.square(x @ w - 1)
        return each.mean(), {"each": each}

    (want, aux), grads = jax.value_and_grad(loss, has_aux=True)(jnp.ones(3), x)
    (got, parts), sums = value_and_grad_in_parts(loss, 3)(jnp.ones(3), x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(sums, grads, rtol=1e-5)
    np.testing.assert_allclose(parts["each"], aux["each"], rtol=1e-5)
