"""Every option of the training objective, on a network with a known answer, and all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_tasks import RNG, _setup

from latent_diffusion.core.rng import example_keys, split_per_example
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process import diffusion
from latent_diffusion.process.objectives import LOSS_WEIGHTS, TIMESTEP_SAMPLING, shift_timesteps
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.tasks.denoising import Constants, Denoising

SCHEDULE = make_schedule()
KEYS = example_keys(RNG, 512)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).normal(size=(512, 4, 4, 2)), jnp.float32)}
DROPOUT = {"dropout": RNG}


class Scaling(UNet):
    """A network that answers gain · z_t."""

    gain: float = 0.0

    def __call__(self, z_t, t, conditioning=None, train=False):
        return self.gain * z_t


def losses(*args, **options):
    return evaluate(*args, **options)[1]


def evaluate(
    kind="eps",
    gain=0.0,
    scale=1.0,
    params=None,
    squares=None,
    dropout=DROPOUT,
    keys=KEYS,
    **options,
):
    """The task, and the losses of one batch."""
    denoiser = Denoiser({}, SCHEDULE, Scaling(gain=gain), make_conditioner({}), kind)
    pixels = make_autoencoder({"regularization": "identity", "image_channels": 2})
    first_stage = FirstStage({}, jnp.asarray(scale), jnp.zeros(()), pixels)
    task = Denoising(denoiser, pixels, optax.identity(), (4, 4, 2), {}, **options)
    params = {"unet": {}, "conditioner": {}, **(params or {})}
    return task, task._loss(params, squares, Constants(first_stage), BATCH, keys, dropout)


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol)


def test_without_options_the_loss_is_the_simple_one():
    seen = losses()
    close(seen["loss"], seen["simple"])
    assert abs(float(seen["simple"].mean()) - 1) < 0.05  # of eps against nothing
    close(seen["prior_bits"], diffusion.prior_bits_per_dim(SCHEDULE, BATCH["image"]))


def test_the_absolute_loss():
    assert abs(float(losses(loss="l1")["simple"].mean()) - (2 / np.pi) ** 0.5) < 0.02
    with pytest.raises(ValueError, match="unknown loss 'l3'; known: l1, l2"):
        losses(loss="l3")


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
def test_weights_belong_to_the_timestep(name, kind):
    seen = losses(kind, loss_weight=name)
    close(seen["loss"], LOSS_WEIGHTS[name](SCHEDULE, kind)[seen["t"]] * seen["simple"])


def test_the_bound_is_added():
    seen = losses(elbo_weight=0.3)
    elbo = LOSS_WEIGHTS["elbo"](SCHEDULE, "eps")[seen["t"]]
    close(seen["loss"], (1 + 0.3 * elbo) * seen["simple"])


def test_logvar_of_the_timestep():
    logvar = jnp.linspace(-1, 1, 1000)
    seen = losses(params={"logvar": logvar}, learn_logvar=True)
    v = logvar[seen["t"]]
    close(seen["loss"], seen["simple"] / jnp.exp(v) + v, rtol=1e-4)


def test_offset_noise_is_part_of_the_target():
    assert abs(float(losses(offset_noise=1.0)["simple"].mean()) - 2) < 0.15


def test_input_perturbation_is_seen_in_training_only_and_not_in_the_target():
    """With z_0 = 0 and the input for an answer, the error in z_0 is the input's variance."""

    def variance(dropout):
        seen = losses("x0", 1.0, scale=0.0, dropout=dropout, input_perturbation=1.0)
        return float(jnp.mean(seen["simple"] / SCHEDULE.sigma_t(seen["t"]) ** 2))

    assert abs(variance(DROPOUT) - 2) < 0.1
    assert abs(variance(None) - 1) < 0.05
    target = losses(input_perturbation=1.0)["simple"]
    close(target, losses()["simple"])


@pytest.mark.parametrize("name", TIMESTEP_SAMPLING)
def test_timesteps_are_drawn_by_their_name(name):
    keys = split_per_example(KEYS, 6)[1]
    expected = TIMESTEP_SAMPLING[name](keys, SCHEDULE)
    np.testing.assert_array_equal(losses(timestep_sampling=name)["t"], expected)


def test_timesteps_may_be_those_of_little_noise_alone():
    every, clean = (np.asarray(losses(max_noise=share)["t"]) for share in (1.0, 0.2))
    np.testing.assert_array_equal(clean, every // 5)
    with pytest.raises(ValueError, match=r"diffusion\.max_noise=0\.2 needs another"):
        losses(max_noise=0.2, timestep_sampling="loss", squares=jnp.ones(1000))


def test_timesteps_that_follow_the_loss_leave_its_mean_alone():
    squares = jnp.where(jnp.arange(1000) < 500, 9.0, 1.0)  # the losses are 3 and 1
    seen = losses(squares=squares, timestep_sampling="loss")
    share = float(jnp.mean(seen["t"] < 500))
    assert abs(share - 0.75) < 0.06
    factor = seen["loss"] / seen["simple"]
    close(factor[seen["t"] < 500], 2 / 3, rtol=0.01)
    close(factor[seen["t"] >= 500], 2, rtol=0.01)
    plain = losses(squares=squares, timestep_sampling="loss", dropout=None)
    close(plain["loss"], plain["simple"])


@pytest.mark.parametrize(
    "options",
    [
        {"loss_weight": "elbo"},
        {"elbo_weight": 1e4},
        {"learn_logvar": True, "params": {"logvar": jnp.linspace(-4, 4, 1000)}},
    ],
)
def test_timesteps_follow_the_loss_that_is_minimised(options):
    """With the weights learned, an estimate deviates by the noise of single errors (1/4) alone."""
    options = {"timestep_sampling": "loss", **options}

    @jax.jit
    def step(squares, rng):
        task, seen = evaluate(squares=squares, keys=example_keys(rng, 512), **options)
        return task._update_squares(squares, seen, None), seen["loss"]

    squares = jnp.ones(1000)
    for rng in jax.random.split(RNG, 300):
        squares, loss = step(squares, rng)
    uniform = losses(squares=None, dropout=None, **options)["loss"]
    deviations = [float(jnp.std(x) / jnp.abs(jnp.mean(x))) for x in (loss, uniform)]
    assert deviations[0] < 0.5 < 1.0 < deviations[1]


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown timestep_sampling 'los'; known: importance"):
        losses(timestep_sampling="los")


@pytest.mark.parametrize(("shift", "shares"), [(1, [0.1, 0.5, 1.0]), (3, [0.25, 0.75, 1.0])])
def test_shifted_timesteps_have_the_shifted_share_of_the_noise(shift, shares):
    """σ' = shift·σ / (1 + (shift − 1)·σ), Esser et al. 2024, eq. 23."""
    schedule = make_schedule("rectified_flow", num_timesteps=1000)
    t = shift_timesteps(jnp.array([99, 499, 999]), schedule, shift)
    np.testing.assert_allclose(schedule.sigma_t(t), shares, rtol=1e-5)


def test_all_options_train_together_on_a_rectified_flow():
    _, first, constants, batch, step = _setup(
        "denoising",
        ("diffusion.schedule", "rectified_flow"),
        ("diffusion.prediction", "flow"),
        ("diffusion.learn_logvar", True),
        ("diffusion.elbo_weight", 1e-4),
        ("diffusion.offset_noise", 0.1),
        ("diffusion.input_perturbation", 0.1),
        ("diffusion.timestep_sampling", "loss"),
        ("optimizer.weight_decay", 0.0),
    )
    assert set(first.params) == {"unet", "conditioner", "logvar"}
    state, simple = first, []
    for _ in range(15):
        state, metrics = step(state, constants, batch, RNG)
        simple.append(float(metrics["simple"]))
    assert np.all(np.isfinite(simple))
    # Timesteps that were met: their losses are remembered, and their log-variance has moved.
    met = state.squares != 1.0
    assert 20 < int(met.sum()) <= 15 * 8
    np.testing.assert_array_equal(state.params["logvar"] != 0, met)
