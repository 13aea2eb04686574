"""Facts about the two train steps, on models small enough to differentiate by hand."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import BATCH, SIZE, make_batch, make_config

from latent_diffusion.core.rng import init_key
from latent_diffusion.nets.losses.adversarial import hinge_d_loss
from latent_diffusion.optimisation.optimizers import make_optimizer
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

RNG = jax.random.key(7)
FROZEN = {"vocab_size": 2048, "max_positions": 4, "width": 16, "depth": 1, "num_heads": 2}
FROZEN |= {"pooling": "mean"}
GATED = (  # one step to compile for all that the autoencoder's tests ask
    ("optimizer.name", "adam"),
    ("optimizer.b1", 0.5),
    ("autoencoding.logvar_init", 0.3),
    ("autoencoding.disc_start", 2),
    ("autoencoding.adversarial_start", 3),
)


@functools.cache
def _setup(task, *fields):
    config = make_config(task, **dict(fields))
    if task == "denoising":
        config.conditioners.bert = ConfigDict(FROZEN)
        config.pretrained.bert = "anywhere"  # the loop would read it; random weights do here
    made = TASKS[task](config)
    init = jax.jit(lambda rng: made.init(rng, batch_spec(config)))
    state, constants = init(init_key(0))
    return made, state, constants, make_batch(config), jax.jit(made.train_step)


def _moved(before, after):
    return any(
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_loss_falls_on_one_batch_and_everything_that_should_learn_moves():
    _, first, constants, batch, step = _setup("autoencoding", *GATED)
    state, losses = first, []
    for _ in range(12):
        state, metrics = step(state, constants, batch, RNG)
        losses.append(float(metrics["l1"]))
    assert losses[-1] < 0.95 * losses[0]
    assert _moved(first.params["autoencoder"], state.params["autoencoder"])
    assert _moved(first.disc_params, state.disc_params)
    assert float(state.params["logvar"]) != float(first.params["logvar"])
    assert all(np.isfinite(float(value)) for value in metrics.values())


def test_discriminator_learns_from_its_step_on_and_reaches_the_generator_from_its_own():
    _, state, constants, batch, step = _setup("autoencoding", *GATED)
    another = jax.tree.map(lambda x: x + 0.1, state.disc_params)
    for number in range(4):
        before = state
        state, metrics = step(before, constants, batch, RNG)
        judged, _ = step(before.replace(disc_params=another), constants, batch, RNG)
        assert _moved(before.params, state.params)
        learns = _moved(before.disc_params, state.disc_params)
        assert learns == (number >= 2) == bool(metrics["disc_factor"])
        # Until its verdict counts, it is all one to the generator which discriminator judges.
        reaches = _moved(judged.params, state.params)
        assert reaches == (number >= 3) == bool(metrics["adversarial_factor"])


def test_weight_decay_begins_with_the_discriminator():
    made, state, *_ = _setup("autoencoding", *GATED)
    decay = {**make_config("autoencoding").optimizer, "name": "adamw", "weight_decay": 0.5}
    tx = make_optimizer({**decay, "learning_rate": 0.1, "warmup_steps": 0}, 9)
    made = dataclasses.replace(made, disc_tx=tx)
    state = state.replace(disc_opt_state=tx.init(state.disc_params))
    grads = jax.tree.map(jnp.zeros_like, (state.params, state.disc_params))
    update = jax.jit(lambda state: made._update(state, *grads).disc_params)
    for number in range(3):
        after = update(state.replace(step=jnp.int32(number)))
        assert _moved(state.disc_params, after) == (number >= 2)


def test_one_pass_gradients_equal_three_separate_differentiations():
    task, state, constants, batch, step = _setup("autoencoding", *GATED)
    state = state.replace(step=jnp.asarray(5, jnp.int32))  # all of the loss counts from step 3 on
    x = jnp.asarray(batch["image"])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(RNG, 5), jnp.arange(BATCH))
    variables = {"params": state.disc_params, "batch_stats": state.disc_stats}

    def logits(image, params=state.disc_params):
        out, _ = task.discriminator.apply(
            variables | {"params": params}, image, train=True, mutable=["batch_stats"]
        )
        return out

    def reconstruct(params):
        return task.autoencoder.apply({"params": params["autoencoder"]}, x, keys, True)

    def nll(params):
        rec = jnp.abs(x - reconstruct(params).x)
        return jnp.sum(rec / jnp.exp(params["logvar"]) + params["logvar"]) / BATCH

    def adversarial(params):
        return -jnp.mean(logits(reconstruct(params).x))

    def last_norm(grads):
        return jnp.linalg.norm(grads["autoencoder"]["decoder"]["conv_out"]["kernel"])

    @jax.jit
    def literal(params):
        d_nll, d_adv = jax.grad(nll)(params), jax.grad(adversarial)(params)
        weight = task.adversarial_weight * last_norm(d_nll) / (last_norm(d_adv) + 1e-4)

        def total(params):
            reg = reconstruct(params).regularization
            return nll(params) + task.reg_weight * reg + weight * adversarial(params)

        x_rec = reconstruct(params).x
        d_disc = jax.grad(lambda p: hinge_d_loss(logits(x, p), logits(x_rec, p)))(state.disc_params)
        logged = {"loss": total(params), "d_weight": weight, "g_loss": adversarial(params)}
        logged |= {"logits_real": logits(x).mean(), "logits_fake": logits(x_rec).mean()}
        return jax.grad(total)(params), d_disc, logged

    grads, disc_grads, logged = literal(state.params)
    after, metrics = step(state, constants, batch, RNG)
    for name, value in logged.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
    # Adam's first moment after one step is (1 - b1) times the gradient.
    b1 = 0.5
    for expected, opt_state in ((grads, after.opt_state), (disc_grads, after.disc_opt_state)):
        moments = jax.tree.map(lambda mu: mu / (1 - b1), opt_state[0].mu)
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        for got, want in zip(jax.tree.leaves(moments), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * scale)


def test_the_discriminators_statistics_have_seen_the_real_and_then_the_made_pictures():
    task, state, constants, batch, step = _setup("autoencoding", *GATED)
    x, stats = jnp.asarray(batch["image"]), state.disc_stats
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(RNG, 0), jnp.arange(BATCH))
    made = task.autoencoder.apply({"params": state.params["autoencoder"]}, x, keys, True).x
    for image in (x, made):
        variables = {"params": state.disc_params, "batch_stats": stats}
        _, moved = task.discriminator.apply(variables, image, train=True, mutable=["batch_stats"])
        stats = moved["batch_stats"]
    after, _ = step(state, constants, batch, RNG)
    assert _moved(state.disc_stats, stats)
    for got, want in zip(*map(jax.tree.leaves, (after.disc_stats, stats)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_denoising_learns_and_leaves_the_first_stage_alone():
    _, first, constants, batch, step = _setup("denoising")
    state, losses = first, []
    for _ in range(15):
        state, metrics = step(state, constants, batch, RNG)
        losses.append(float(metrics["loss"]))
    assert min(losses[-3:]) < losses[0]
    assert _moved(first.params["unet"], state.params["unet"])
    # The text encoder gets a gradient once the U-Net's zero-initialised outputs have moved.
    assert _moved(first.params["conditioner"], state.params["conditioner"])
    assert set(state.params) == set(state.ema_params) == {"unet", "conditioner"}


@pytest.mark.parametrize("task", TASKS)
def test_the_averages_of_every_task_follow_as_the_config_says(task):
    made = TASKS[task](make_config(task, ema_decay=0.05))
    assert getattr(made, "student", made).ema_decay == 0.05


class Drawn(Exception):
    """Ends a step where it draws its keys."""


@pytest.mark.parametrize("task", TASKS)
def test_every_step_of_every_task_has_a_key_of_its_own(task, monkeypatch):
    config = make_config(task)
    made = TASKS[task](config)
    state, constants = jax.eval_shape(made.init, jax.random.key(0), batch_spec(config))

    def drawn(rng, *given):
        raise Drawn(jax.random.key_data(rng).tolist())

    monkeypatch.setattr(sys.modules[type(made).__module__], "example_keys", drawn)
    batch = {"image": jnp.zeros((1, SIZE, SIZE, 3)), "class_label": jnp.zeros(1, jnp.int32)}
    batch["codes"] = jnp.zeros((1, 8, 8), jnp.int32)
    seen = [jax.random.key_data(RNG).tolist()]
    for step in range(3):
        with pytest.raises(Drawn) as keys:
            made.train_step(state.replace(step=jnp.asarray(step)), constants, batch, RNG)
        seen.append(keys.value.args[0])
    assert len({tuple(key) for key in seen}) == 4


def test_frozen_means_frozen():
    """Neither the first stage nor a pretrained conditioner has any place in the state."""
    made, state, constants, batch, step = _setup("denoising")
    before = jax.tree.map(np.array, constants)
    assert jax.tree.leaves(constants.first_stage.params)
    assert set(constants.conditioner) == {"bert"}
    for _ in range(3):
        state, _ = step(state, constants, batch, RNG)
    jax.tree.map(np.testing.assert_array_equal, before, constants)
    # Neither optimiser memory nor an average: one array each for parameters, their average and
    # the two moments, of what learns alone.
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert sum("token_emb" in path for path in paths) == 4
    assert not any("bert" in path for path in paths)
    # It is read: other weights of it give another loss.
    zeros = jax.tree.map(jnp.zeros_like, constants.conditioner)
    _, a = step(state, constants, batch, RNG)
    _, b = step(state, constants.replace(conditioner=zeros), batch, RNG)
    assert float(a["loss"]) != float(b["loss"])
    counted = made.components(state, constants)
    assert counted["bert (frozen)"] is constants.conditioner["bert"]


def test_ema_follows_the_new_parameters_with_warm_up():
    _, state, constants, batch, step = _setup("denoising")
    after, _ = step(state, constants, batch, RNG)
    decay = (1 + 1) / (10 + 1)  # n = 1
    for old, new, ema in zip(
        *map(jax.tree.leaves, (state.params, after.params, after.ema_params)), strict=True
    ):
        np.testing.assert_allclose(ema, decay * old + (1 - decay) * new, atol=1e-6)


def test_conditioning_dropout_one_hides_the_prompt():
    _, state, constants, batch, step = _setup("denoising", ("diffusion.drop_rate", 1.0))
    other = batch | {"tokens": batch["tokens"] + 1}
    for _ in range(3):  # away from the zero-initialised outputs
        state, _ = step(state, constants, batch, RNG)
    _, a = step(state, constants, batch, RNG)
    _, b = step(state, constants, other, RNG)
    assert float(a["loss"]) == float(b["loss"])
    _, _, _, _, seldom = _setup("denoising")
    _, a = seldom(state, constants, batch, RNG)
    _, b = seldom(state, constants, other, RNG)
    assert float(a["loss"]) != float(b["loss"])


def test_cached_moments_give_the_loss_of_the_images():
    _, state, constants, batch, step = _setup("denoising")
    moments = jax.jit(constants.first_stage.moments)(batch["image"])
    cached = {"moments": moments, "tokens": batch["tokens"]}
    _, a = step(state, constants, batch, RNG)
    _, b = step(state, constants, cached, RNG)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_eval_step_and_show_give_one_value_or_image_per_example(task):
    made, state, constants, batch, _ = _setup(task)
    values = jax.eval_shape(made.eval_step, state, constants, batch, RNG)
    assert {value.shape for value in values.values()} == {(BATCH,)}
    images = jax.eval_shape(made.show, state, constants, batch, RNG)
    assert {image.shape for image in images.values()} == {(BATCH, SIZE, SIZE, 3)}


def test_the_average_of_the_first_stage_follows_its_new_parameters():
    _, state, constants, batch, step = _setup("autoencoding", *GATED)
    after, _ = step(state, constants, batch, RNG)
    decay = (1 + 1) / (10 + 1)  # n = 1
    for old, new, ema in zip(
        *map(jax.tree.leaves, (state.params, after.params, after.ema_params)), strict=True
    ):
        np.testing.assert_allclose(ema, decay * old + (1 - decay) * new, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "field", "value", "allowed"),
    [
        ("denoising", "diffusion.max_noise", 20.0, r"\(0, 1\]"),  # per cent
        ("denoising", "diffusion.shift", 0.0, r"\(0, inf\)"),
        ("denoising", "diffusion.drop_rate", 10.0, r"\[0, 1\]"),
        ("denoising", "unet.dropout", 10.0, r"\[0, 1\)"),
        ("distillation", "distillation.target_decay", 1.5, r"\[0, 1\]"),
        ("prior", "prior.pkeep", 90.0, r"\[0, 1\]"),
        ("autoencoding", "autoencoding.gumbel_temperature", (1.0, 0.0), r"\(0, inf\)"),
        ("autoencoding", "autoencoder.codebook_ema_decay", 1.5, r"\[0, 1\]"),
    ],
)
def test_shares_and_factors_outside_their_ranges_are_one_line(task, field, value, allowed):
    with pytest.raises(ValueError, match=rf"^{field}=.* must lie in {allowed}$"):
        TASKS[task](make_config(task, **{field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unet.guidance_dim": 8}, r"unet\.guidance_dim=8: .* 'denoising' doesn't train it"),
        ({"sampling.end": 0.5}, r"sampling\.end=0\.5: a run's samples have all steps"),
        ({"sampling.strength": 0.5}, r"sampling\.strength=0\.5: a run's samples"),
    ],
)
def test_fields_without_a_meaning_in_training_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        TASKS["denoising"](make_config("denoising", **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("quantize_x0", True, "quantize_x0 needs a first stage whose latents are codes"),
        ("tile_size", 3, "tile size 3 and overlap 0 must be multiples of f=2"),
    ],
)
def test_samples_for_the_log_have_the_options_of_the_first_stage(option, value, message):
    made, state, constants, batch, _ = _setup("denoising", (f"sampling.{option}", value))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(made.show, state, constants, batch, RNG)
