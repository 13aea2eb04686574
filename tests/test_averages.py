"""Averages of any width come from snapshots of two (Karras et al. 2024, section 3)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import several
from tiny import make_config

import latent_diffusion as ldm
from latent_diffusion.convert.frozen_parts import load_autoencoder_params
from latent_diffusion.optimisation.averages import (
    WIDEST,
    _inner_product,
    averages_of,
    exponent,
    weights,
    with_power_averages,
)
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.training import loop
from latent_diffusion.training.averages import rebuild

WIDTHS = (0.05, 0.1)


def profile(step, width, at):
    """The weight of the parameters at a moment in the average of a width."""
    gamma = exponent(width)
    return np.where(at <= step, (gamma + 1) / step * (at / step) ** gamma, 0.0)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, WIDEST])
def test_a_width_is_the_standard_deviation_of_its_profile(width):
    at = (np.arange(1_000_000) + 0.5) / 1_000_000
    p = profile(1.0, width, at)
    mean = (at * p).mean()
    assert p.mean() == pytest.approx(1, rel=1e-4)
    assert np.sqrt((at**2 * p).mean() - mean**2) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(ValueError, match=rf"width of an average is {width}; .* \(0, {WIDEST}\]"):
        exponent(width)


def test_inner_products_are_integrals():
    at = (np.arange(1_000_000) + 0.5) / 1_000_000 * 100
    for first, second in [((100, 0.05), (40, 0.1)), ((30, 0.2), (80, 0.05)), ((50, 0.1),) * 2]:
        integral = (profile(*first, at) * profile(*second, at)).mean() * 100
        (t_a, w_a), (t_b, w_b) = first, second
        product = _inner_product(np.float64(t_a), exponent(w_a), np.float64(t_b), exponent(w_b))
        assert product == pytest.approx(integral, rel=1e-5)


def trajectory(num_steps):
    """Parameters that move on a curve, with noise."""
    time = np.arange(num_steps) / num_steps
    noise = np.random.default_rng(0).normal(0, 0.05, num_steps)
    return (np.exp(-3 * time) + np.sin(9 * time) + noise).astype(np.float32)


def averaged(values, widths):
    """The averages after every update of an optimiser that follows the values."""
    tx = with_power_averages(optax.identity(), widths)
    params = {"x": jnp.zeros(())}

    def step(carry, value):
        params, state = carry
        updates, state = tx.update({"x": value - params["x"]}, state, params)
        return (optax.apply_updates(params, updates), state), averages_of({"tx": state})

    averages = jax.lax.scan(step, (params, tx.init(params)), values)[1]
    return jax.tree.map(np.asarray, averages)


def test_any_width_comes_from_snapshots_of_two():
    values = trajectory(4000)
    wanted = averaged(values, (*WIDTHS, 0.07, 0.15, 0.2))
    steps = range(250, 4001, 250)
    pairs = [(step, width) for step in steps for width in WIDTHS]
    snapshots = np.array([wanted[str(width)]["x"][step - 1] for step, width in pairs])
    for step, width in [(4000, 0.07), (4000, 0.15), (3250, 0.07), (3250, 0.15)]:
        used = [pair[0] <= step for pair in pairs]
        given = [pair for pair in pairs if pair[0] <= step]
        x = weights(given, step, width)
        assert x.sum() == pytest.approx(1, abs=2e-3)
        assert x @ snapshots[used] == pytest.approx(wanted[str(width)]["x"][step - 1], abs=1e-3)
    exact = weights(pairs, 2000, 0.1)
    np.testing.assert_allclose(exact, [pair == (2000, 0.1) for pair in pairs], atol=1e-5)


def test_an_average_follows_its_profile():
    values = trajectory(2000).astype(np.float64)
    at = np.arange(1, 2001)
    for width in (0.05, 0.2):
        got = averaged(values.astype(np.float32), (width,))[str(width)]["x"]
        assert got[0] == pytest.approx(values[0], rel=1e-6)
        p = profile(2000.0, width, at)
        assert got[-1] == pytest.approx((p * values).sum() / p.sum(), abs=2e-3)


def test_a_run_saves_snapshots_of_which_a_command_makes_a_workdir(tmp_path):
    fields = {"optimizer.averages": WIDTHS, "checkpoint.averages_every_steps": 2}
    config = several.make_config(**fields, **{"parallel.mode": "single", "num_steps": 5})
    state = loop.train(config, tmp_path / "run")
    with Checkpointer(tmp_path / "run" / "averages", read_only=True) as snapshots:
        assert snapshots.all_steps() == [2, 4, 5]
        saved = snapshots.restore(step=4).state["0.1"]
    rebuild(tmp_path / "run", 0.1, tmp_path / "given", step=4)
    given = workdir.load_entry(tmp_path / "given", "ema_params")
    got, want, last = map(jax.tree.leaves, (given, saved, state.ema_params))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert max(np.abs(x - y).max() for x, y in zip(got, last, strict=True)) > 1e-4
    rebuild(tmp_path / "run", 0.08, tmp_path / "between")
    assert ldm.load(tmp_path / "between").sample(jax.random.key(0), prompts=["red"]).shape[0] == 1

    refused = [
        (r"given is not empty; --out names a new folder", {"out": tmp_path / "given"}),
        (
            r"averages has no snapshot of step 3; known: 2, 4, 5",
            {"out": tmp_path / "new", "step": 3},
        ),
        (r"width of an average is 0.5", {"out": tmp_path / "new", "width": 0.5}),
    ]
    for message, options in refused:
        with pytest.raises(ValueError, match=message):
            rebuild(tmp_path / "run", **{"width": 0.1, **options})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("ema_decay", "entry"), [(0.0, "params"), (0.9, "ema_params")])
def test_an_average_of_a_first_stage_is_where_its_run_has_parameters(ema_decay, entry, tmp_path):
    run, params = tmp_path / "run", {"autoencoder": {"kernel": np.arange(3, dtype=np.float32)}}
    workdir.save_config(make_config("autoencoding", ema_decay=ema_decay), run)
    with Checkpointer(run / "averages") as snapshots:
        snapshots.save(1, {"0.1": params}, {"widths": ["0.1"]})
    rebuild(run, 0.1, tmp_path / "out")
    loaded = load_autoencoder_params(tmp_path / "out")
    np.testing.assert_allclose(loaded["kernel"], [0, 1, 2], rtol=1e-6)
    np.testing.assert_array_equal(
        loaded["kernel"], workdir.load_entry(tmp_path / "out", entry)["autoencoder"]["kernel"]
    )


def test_snapshots_without_averages_are_refused_at_the_start(tmp_path):
    config = several.make_config(**{"checkpoint.averages_every_steps": 2})
    with pytest.raises(ValueError, match=r"averages_every_steps needs widths in optimizer\.averag"):
        loop.train(config, tmp_path / "run")
