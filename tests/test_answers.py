"""Evaluation, pictures and sampling, held against results that are computed by hand."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import wiring
from answers import (
    CLASS,
    PATTERN,
    RNG,
    SCALE,
    SHIFT,
    SIDE,
    TEXT,
    Answering,
    denoiser,
    first_stage,
    model,
    params_of,
    pixels,
    read,
)  # fmt: skip

from latent_diffusion.core.rng import example_keys
from latent_diffusion.generation.model import Model
from latent_diffusion.models import sampling as sampling_of_models
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.nets.conditioners import Conditioner, make_conditioner
from latent_diffusion.nets.discriminator import PatchGAN
from latent_diffusion.nets.losses.perceptual import LPIPS
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process import objectives
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.runtime import parallel
from latent_diffusion.tasks import denoising as denoising_task
from latent_diffusion.tasks.autoencoding import Autoencoding
from latent_diffusion.tasks.autoencoding import Constants as PerceptualConstants
from latent_diffusion.tasks.autoencoding import State as PerceptualState
from latent_diffusion.tasks.classifying import Classifying
from latent_diffusion.tasks.denoising import Constants, Denoising, State

CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)
LABELS = np.array([0, 1, 2, 1], np.int32)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (4, SIDE, SIDE, 3)).astype(np.float32)
BATCH = {"image": jnp.asarray(IMAGES), "class_label": jnp.asarray(LABELS)}


# ---------------------------------------------------------------------------- latent denoising


def denoising(**fields):
    """The task, and a state whose live parameters are far from the averaged ones."""
    whole = denoiser(CLASS)
    task = Denoising(
        denoiser=whole.replace(params={}),
        autoencoder=first_stage().module,
        tx=optax.sgd(0.1),
        image_shape=(SIDE, SIDE, 3),
        sampling={"sampler": "ddim", "num_steps": 1, "spacing": "trailing", "guidance_scale": 3.0},
        **fields,
    )
    live = params_of(whole.conditioner, bias=5.0, seed=1)
    state = State(jnp.zeros((), jnp.int32), live, whole.params, task.tx.init(live))
    return task, state, Constants(first_stage())


def numbers(params, labels=LABELS, drop=False):
    """What the network reads under these parameters."""
    whole = denoiser(CLASS).replace(params=params)
    batch = {"class_label": jnp.asarray(labels)}
    return np.asarray(read(whole.condition(batch, jnp.full(len(labels), drop))))


def errors(answers):
    """Mean squared error of each answer to the latent of its image."""
    z_0 = (IMAGES - SHIFT) * SCALE
    return np.mean((answers[:, None, None, None] * PATTERN - z_0) ** 2, (1, 2, 3))


def test_evaluation_is_of_the_averaged_parameters_and_never_drops_a_condition():
    task, state, constants = denoising(drop_rate=1.0)
    seen = task.eval_step(state, constants, BATCH, RNG)
    CLOSE(seen["simple"], errors(numbers(state.ema_params)))
    CLOSE(seen["loss"], seen["simple"])


@pytest.mark.parametrize(("rate", "shares"), [(0.0, {0}), (1.0, {4}), (0.5, {1, 2, 3})])
def test_training_drops_the_share_of_the_conditions(rate, shares):
    task, state, constants = denoising(drop_rate=rate, learn_logvar=False)
    _, metrics = task.train_step(state, constants, BATCH, RNG)
    told, untold = (errors(5 + numbers(state.params, drop=drop)) for drop in (False, True))
    masks = [(np.arange(16)[:, None] >> np.arange(4)) & 1][0].astype(bool)
    means = np.where(masks, untold, told).mean(1)
    (mask,) = masks[np.abs(means - float(metrics["loss"])) < 1e-4]
    assert mask.sum() in shares


def test_the_pictures_of_a_run_are_guided_samples_of_the_averaged_parameters():
    task, state, constants = denoising()
    images = task.show(state, constants, BATCH, RNG)
    told, untold = (numbers(state.ema_params, drop=drop) for drop in (False, True))
    CLOSE(images["samples"], pixels(untold + 3.0 * (told - untold)))
    np.testing.assert_array_equal(images["inputs"], IMAGES)
    hole = np.zeros((4, SIDE, SIDE, 1), np.float32)
    hole[:, :2] = 1
    filled = task.show(state, constants, {**BATCH, "mask": jnp.asarray(hole)}, RNG)["samples"]
    np.testing.assert_array_equal(filled, np.where(hole, images["samples"], IMAGES))


def test_a_step_moves_against_the_gradient_and_the_average_follows():
    task, state, constants = denoising(drop_rate=0.0, ema_decay=0.5)

    def loss(params):
        answers = params["unet"]["bias"] + read(
            denoiser(CLASS).replace(params=params).condition(BATCH, jnp.zeros(4, bool))
        )
        z_0 = (IMAGES - SHIFT) * SCALE
        return jnp.mean((answers[:, None, None, None] * PATTERN - z_0) ** 2)

    after, metrics = task.train_step(state, constants, BATCH, RNG)
    grads = jax.grad(loss)(state.params)["unet"]["bias"]
    CLOSE(after.params["unet"]["bias"], 5.0 - 0.1 * grads)
    rate = 1 - min(0.5, 2 / 11)  # warm-up
    CLOSE(after.ema_params["unet"]["bias"], rate * after.params["unet"]["bias"])
    assert int(after.step) == 1 and float(metrics["grad_norm"]) > abs(float(grads))


def test_whatever_is_drawn_at_random_has_keys_of_its_own(monkeypatch):
    """Equal keys would tie, for example, the timestep to whether its condition is dropped."""
    seen = {}

    def watch(owner, name, place=0):
        function = getattr(owner, name)

        def watched(*given, **more):
            seen.update({name: given[place]} if len(given) > place else {})
            return function(*given, **more)

        monkeypatch.setattr(owner, name, watched)

    for name in ("normal_per_example", "bernoulli_per_example"):
        watch(denoising_task, name)
    for name in ("offset_noise", "perturb_input"):
        watch(objectives, name)
    watch(Denoising, "timesteps", 1)
    watch(FirstStage, "encode", 2)
    watch(Conditioner, "prepare", 4)
    task, state, constants = denoising(offset_noise=0.1, input_perturbation=0.1)
    keys = example_keys(RNG, 4)
    task._loss(state.params, None, constants, BATCH, keys, {"dropout": keys[0]})
    assert len(seen) == 7
    step = [keys, *seen.values()]
    seen.clear()
    watch(sampling_of_models, "normal_per_example")
    task.show(state, constants, BATCH, RNG)
    for together in (step, [seen["normal_per_example"], seen["prepare"]]):
        rows = np.concatenate([jax.random.key_data(keys) for keys in together])
        assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_bound_of_the_variance_counts_for_each_of_all_timesteps(monkeypatch):
    """0.001 of 1,000 timesteps is the weight of DiT's code, whose bound is a sum over them."""
    monkeypatch.setattr(denoising_task, "bound", lambda *given: jnp.ones(len(given[-1])))
    monkeypatch.setattr(Denoiser, "with_variance", lambda self, field: self)
    task, state, constants = denoising(variance_weight=0.003)
    seen = task.eval_step(state, constants, BATCH, RNG)
    CLOSE(seen["loss"] - seen["simple"], np.full(4, 3.0))


def test_eight_devices_move_as_one():
    task, state, constants = denoising(drop_rate=0.3)
    batch = {"image": np.tile(IMAGES, (4, 1, 1, 1)), "class_label": np.tile(LABELS, 4)}
    one, eight = (
        parallel.compile_step(task.train_step, mode)(
            parallel.place(jax.tree.map(np.asarray, state), mode), constants, batch, RNG
        )[0].params["unet"]["bias"]
        for mode in ("single", "pmap")
    )
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert float(one) != 5.0


def test_every_step_and_every_example_has_its_noise():
    """With the input for its answer, the network's error is the noise that it sees."""
    task, state, constants = denoising(drop_rate=0.0)
    state = state.replace(params=params_of(task.denoiser.conditioner, gain=1.0))
    same = {"image": jnp.zeros((4, SIDE, SIDE, 3)), "class_label": jnp.zeros(4, jnp.int32)}
    first = state.replace(ema_params=state.params)
    losses = [
        float(task.train_step(first.replace(step=jnp.array(i)), constants, same, RNG)[1]["loss"])
        for i in range(2)
    ]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert len(set(np.asarray(task.eval_step(first, constants, same, RNG)["loss"]).tolist())) == 4


# -------------------------------------------------------------------------------- the other tasks


class Scores(UNet):
    """The same scores for every picture."""

    @nn.compact
    def __call__(self, z_t, t, conditioning=None, train=False):
        scores = self.param("scores", nn.initializers.zeros, (self.out_channels,))
        return jnp.broadcast_to(scores, (len(z_t), len(scores)))


def test_a_classifier_is_evaluated_by_its_averaged_parameters():
    classifier = NoisyClassifier({}, make_schedule(), Scores(3))
    task = Classifying(classifier, first_stage().module, optax.sgd(0.1), (SIDE, SIDE, 3))
    live, average = (
        {"unet": {"scores": jnp.array(scores)}} for scores in ([0.0, 5, 9], [3.0, 2, 1])
    )
    state = State(jnp.zeros((), jnp.int32), live, average, task.tx.init(live))
    seen = task.eval_step(state, Constants(first_stage()), BATCH, RNG)
    assert set(seen) == {f"{k}_{t}" for k in ("loss", "accuracy", "accuracy_5")
                         for t in (0, 250, 500, 750)}  # fmt: skip
    CLOSE(seen["loss_250"], -jax.nn.log_softmax(average["unet"]["scores"])[LABELS])
    shown = task.show(state, Constants(first_stage()), BATCH, RNG)
    z_t = (np.concatenate([shown[name] for name in ("inputs", "noised")]) - SHIFT) * SCALE
    noise = z_t[4:] - float(make_schedule().alphas[500]) * z_t[:4]
    np.testing.assert_allclose(np.std(noise), make_schedule().sigmas[500], rtol=0.15)
    assert seen["accuracy_0"].tolist() == [1, 0, 0, 0]
    after, metrics = task.train_step(state, Constants(first_stage()), BATCH, RNG)
    shares = np.bincount(LABELS, minlength=3) / 4
    CLOSE(
        after.params["unet"]["scores"],
        live["unet"]["scores"] - 0.1 * (jax.nn.softmax(live["unet"]["scores"]) - shares),
    )
    assert float(metrics["accuracy"]) == 0.25
    late = dataclasses.replace(task, ema_decay=0.5), state.replace(step=jnp.asarray(1000))
    after, _ = late[0].train_step(late[1], Constants(first_stage()), BATCH, RNG)
    CLOSE(
        after.ema_params["unet"]["scores"],
        (average["unet"]["scores"] + after.params["unet"]["scores"]) / 2,
    )
    with pytest.raises(ValueError, match=r"a classifier needs class_label; the batch has image$"):
        task.eval_step(state, Constants(first_stage()), {"image": BATCH["image"]}, RNG)


def test_a_label_among_the_best_five_is_a_hit_of_its_own():
    classifier = NoisyClassifier({}, make_schedule(), Scores(8))
    task = Classifying(classifier, first_stage().module, optax.sgd(0.1), (SIDE, SIDE, 3))
    falling, labels = {"unet": {"scores": -jnp.arange(8.0)}}, jnp.arange(8)
    z_0, keys = jnp.zeros((8, SIDE, SIDE, 3)), jax.random.split(RNG, 8)
    seen = task._scores(falling, z_0, 0 * labels, keys, labels)
    assert seen["accuracy"].tolist() == [1] + 7 * [0]
    assert seen["accuracy_5"].tolist() == 5 * [1] + 3 * [0]


class Reconstruction(NamedTuple):
    """What an autoencoder returns, as far as evaluation reads it."""

    x: jax.Array


class Scaled(nn.Module):
    """Reconstructions are gain · x."""

    @nn.compact
    def __call__(self, x):
        return Reconstruction(self.param("gain", nn.initializers.ones, ()) * x)


@pytest.mark.parametrize("averaged", [True, False])
def test_reconstructions_are_those_of_the_averaged_parameters_if_there_are_any(averaged):
    task = Autoencoding(Scaled(), PatchGAN(), None, optax.identity(), optax.identity())
    live, average = ({"autoencoder": {"gain": jnp.array(gain)}} for gain in (0.2, 0.5))
    state = PerceptualState(0, live, average if averaged else None, *[None] * 5)
    seen = task.eval_step(state, PerceptualConstants(None), BATCH, RNG)
    gain = 0.5 if averaged else 0.2
    CLOSE(seen["l1"], np.mean(np.abs((1 - gain) * IMAGES), (1, 2, 3)))
    mse = np.mean(((1 - gain) * IMAGES) ** 2, (1, 2, 3))
    CLOSE(seen["psnr"], 10 * np.log10(4 / mse))
    images = task.show(state, PerceptualConstants(None), BATCH, RNG)
    CLOSE(images["reconstructions"], gain * IMAGES)


@pytest.mark.parametrize(("reduction", "count"), [("sum", 4), ("mean", IMAGES.size)])
def test_errors_are_summed_over_a_picture_or_averaged(reduction, count, monkeypatch):
    """Rombach et al. 2022: the sum in models with a KL, the mean in models with a codebook."""
    distance = jnp.arange(4.0)
    monkeypatch.setattr(Autoencoding, "_distance", lambda self, c, x, y: distance * (x != y).any())
    options = {"reduction": reduction, "perceptual_weight": 0.5}
    task = Autoencoding(
        Scaled(), PatchGAN(), LPIPS(), optax.identity(), optax.identity(), **options
    )
    nll, metrics = task._reconstruction_loss(
        0.2 * BATCH["image"], jnp.array(0.3), BATCH["image"], PerceptualConstants(None)
    )
    errors = np.abs(0.8 * IMAGES) + 0.5 * np.arange(4.0)[:, None, None, None]
    CLOSE(nll, np.sum(errors / np.exp(0.3) + 0.3) / count)
    CLOSE(metrics["rec_loss"], np.mean(errors))
    state = PerceptualState(0, {"autoencoder": {"gain": jnp.array(0.2)}}, None, *[None] * 5)
    CLOSE(task.eval_step(state, PerceptualConstants(None), BATCH, RNG)["lpips"], distance)


# ---------------------------------------------------------------------------- whole sampling calls

PROMPTS = ("red cat", "blue dog")


def sample(prompts=PROMPTS, made=None, **options):
    options = {"mode": "single", "guidance_scale": 3.0, **options}
    return (made or model(TEXT)).sample(RNG, list(prompts), **options)


def told(*prompts):
    return np.asarray(read(model(TEXT).condition(prompts=list(prompts))))


def test_the_guided_answer_is_decoded():
    untold, wanted = told(""), told(*PROMPTS)
    CLOSE(sample(), pixels(untold + 3.0 * (wanted - untold)))
    CLOSE(sample(guidance_scale=1.0), pixels(wanted))
    CLOSE(sample(guidance_scale=[0.0]), pixels(np.repeat(untold, 2)))
    assert np.ptp(wanted) > 0.02 and np.abs(untold - wanted).min() > 0.02


def test_each_prompt_is_guided_away_from_its_negative_one():
    wanted, avoided = told(*PROMPTS), told("green", "cat")
    expected = np.repeat(avoided + 3.0 * (wanted - avoided), 2)
    CLOSE(sample(negative_prompts=["green", "cat"], num_images=2), pixels(expected))
    avoided = told("green")
    CLOSE(sample(negative_prompts="green"), pixels(avoided + 3.0 * (wanted - avoided)))


def test_more_prompts_are_added_with_their_weights():
    untold, wanted, more = told(""), told(*PROMPTS), told("green", "cat")
    direction = wanted - untold + 0.5 * (more[0] - untold) - 0.25 * (more[1] - untold)
    images = sample(more_prompts=[("green", 0.5), ("cat", -0.25)])
    CLOSE(images, pixels(untold + 3.0 * direction))


def test_a_picture_starts_at_the_noise_of_the_first_step_that_is_left():
    """The network's answer is z_t, in which the picture has the amplitude of this timestep."""
    made, start = model(TEXT, gain=1.0), np.zeros((2, SIDE, SIDE, 3), np.float32)
    given = {"image": IMAGES[:1], "strength": 0.5, "num_steps": 2, "z_T": start}
    images = sample(made=made, guidance_scale=1.0, **given)
    alpha = float(make_schedule().alphas[499])
    z_0 = alpha * (IMAGES[:1] - SHIFT) * SCALE
    CLOSE(images, np.clip(pixels(told(*PROMPTS)) + z_0 / SCALE, -1, 1))


def test_a_bound_on_estimates_reaches_samplers_that_read_the_noise_alone():
    z_0 = np.clip((pixels(told(*PROMPTS)) - SHIFT) * SCALE, -0.01, 0.01)
    images = sample(sampler="lms", clip_x0=0.01, guidance_scale=1.0)
    CLOSE(images, z_0 / SCALE + SHIFT)


def test_outside_the_interval_there_is_no_guidance():
    CLOSE(sample(guidance_interval=(0, 500)), pixels(told(*PROMPTS)))
    CLOSE(sample(guidance_interval=(900, 999)), sample())


def test_rescaled_guidance_has_the_spread_of_the_condition():
    untold, wanted = told(""), told(*PROMPTS)
    guided = untold + 3.0 * (wanted - untold)
    expected = 0.5 * guided + 0.5 * np.abs(wanted) * np.sign(guided)
    CLOSE(sample(guidance_rescale=0.5), pixels(expected))


def test_classes_and_their_null():
    made = model(CLASS)
    wanted, untold = (numbers(made.denoiser.params, [2, 0], drop) for drop in (False, True))
    images = made.sample(RNG, class_labels=[2, 0], guidance_scale=3.0, mode="single")
    CLOSE(images, np.clip(pixels(untold + 3.0 * (wanted - untold)), -1, 1))
    CLOSE(
        made.condition(class_labels=[2, 0]).context,
        made.denoiser.condition({"class_label": jnp.array([2, 0])}, jnp.zeros(2, bool)).context,
    )


def test_images_are_condition_major():
    images = sample(num_images=3, guidance_scale=1.0, batch_size=4)
    CLOSE(images, pixels(np.repeat(told(*PROMPTS), 3)))


@functools.cache
def option_rows():
    """The options of wiring.OPTIONS with pictures of this size in the place of words."""
    stand_in = {"image": IMAGES[:1], "other image": IMAGES[1:2], "noise": 0 * IMAGES[:2]}
    stand_in["no hole"] = np.zeros((1, SIDE, SIDE, 1), np.float32)

    def filled(value):
        return stand_in.get(value, value) if isinstance(value, str) else value

    return {
        option: (filled(value), {name: filled(other) for name, other in others.items()})
        for option, (value, others) in wiring.OPTIONS.items()
    }


class Mixing(Answering):
    """A network whose answer depends on z_t and t by more than a factor."""

    @nn.compact
    def __call__(self, z_t, t, conditioning=None, train=False):
        mixed = jnp.tanh(z_t + 3 * read(conditioning)[:, None, None, None])
        bias = [self.param(name, nn.initializers.zeros, ()) for name in ("gain", "bias")]
        return mixed * (1 + t / 1000)[:, None, None, None] + sum(bias)


MADE = {}


def mixed_pictures(options):
    """Four steps of sampling with these options; made once."""
    if repr(options) not in MADE:
        made = model(TEXT)
        made = made.replace(denoiser=made.denoiser.replace(network=Mixing()))
        MADE[repr(options)] = sample(made=made, **{"num_steps": 4, **options})
    return MADE[repr(options)]


@pytest.mark.parametrize("option", wiring.OPTIONS)
def test_an_option_of_sampling_changes_the_pictures(option):
    value, others = option_rows()[option]
    before, after = mixed_pictures(others), mixed_pictures({**others, option: value})
    assert np.isfinite(after).all()
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3


def test_an_ancestral_sampler_without_noise_is_eulers():
    options = {"num_steps": 4, "spacing": "uniform"}
    without = mixed_pictures({**options, "sampler": "euler_ancestral", "eta": 0.0})
    CLOSE(without, mixed_pictures({**options, "sampler": "euler"}))


def test_a_call_goes_on_where_another_stopped():
    made = model(TEXT)
    made = made.replace(denoiser=made.denoiser.replace(network=Mixing()))
    options = {"made": made, "sampler": "euler", "num_steps": 5, "guidance_scale": 2.0}
    whole, between = sample(**options), sample(**options, end=0.4)
    CLOSE(sample(**options, z_T=between, start=0.4), whole)
    assert np.abs(between - whole).max() > 1e-3
    scales = [1.5, 2.0, 1.0, 3.0, 2.5]  # of all steps, of which each call takes its own
    varied = {**options, "guidance_scale": scales}
    between = sample(**varied, end=0.4)
    CLOSE(sample(**varied, z_T=between, start=0.4), sample(**varied))
    # From a picture: its noise is that of the first step, as `strength` takes it.
    given = {**options, "image": IMAGES[:1]}
    CLOSE(sample(**given, start=0.4), sample(**given, strength=0.4))
    for wrong, message in (
        ({"start": 0.4}, "start needs z_T"),
        ({"start": 0.4, "end": 0.4, "z_T": between}, "no step lies between start=0.4 and end=0.4"),
        ({"end": 1.0}, r"end must lie in \[0, 1\)"),
        ({"end": 0.2, "strength": 0.5, "image": IMAGES[:1]}, "give strength, or start and end"),
        ({"end": 0.2, "sampler": "lcm"}, "'lcm' ends without noise, so it can't stop at end=0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(**{**options, **wrong})


def test_a_call_that_stops_early_ends_with_a_step_like_the_others():
    """Steps of lower order are the last ones of the call that goes on."""
    made = model(TEXT)
    made = made.replace(denoiser=made.denoiser.replace(network=Mixing()))
    options = {"made": made, "sampler": "dpm_solver_pp_2m", "num_steps": 5, "guidance_scale": 1.0}
    lower, plain = (
        sample(**options, end=0.4, lower_order_final=ends, euler_at_final=ends)
        for ends in (True, False)
    )
    np.testing.assert_array_equal(lower, plain)


def test_another_key_gives_other_pictures():
    made = model(TEXT)
    made = made.replace(denoiser=made.denoiser.replace(network=Mixing()))
    one, other = (
        made.sample(rng, ["red cat"], num_steps=2, mode="single")
        for rng in (RNG, jax.random.key(6))
    )
    assert np.abs(one - other).max() > 0.01


class Reading(UNet):
    """A network whose answer is what it is told, added up."""

    @nn.compact
    def __call__(self, z_t, t, conditioning=None, train=False):
        bias = [self.param(name, nn.initializers.zeros, ()) for name in ("gain", "bias")]
        leaves = [leaf.reshape(len(z_t), -1) for leaf in jax.tree.leaves(conditioning)]
        weights = [jnp.cos(jnp.arange(leaf.shape[1])) for leaf in leaves]
        total = sum(leaf @ weight for leaf, weight in zip(leaves, weights, strict=True))
        return 0.02 * jnp.sin(total + sum(bias))[:, None, None, None] * PATTERN


def noise(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


BOXES = [[(3, (0.1, 0.2, 0.6, 0.9))], [(4, (0.1, 0.2, 0.6, 0.9))]]
LEVELS = {"low_res": {"num_levels": 40, "max_noise_level": 30, "width": 8}}
# argument -> (conditioner, two values, what else is given)
TOLD = {
    "layout": ({"layout": {"vocab_size": 26, "max_length": 8, "width": 6, "depth": 0}}, BOXES, {}),
    "segmentation": (
        {"spatial_rescaler": {"num_classes": 4, "num_stages": 0}},
        [np.zeros((SIDE, SIDE), int), np.ones((SIDE, SIDE), int)],
        {},
    ),
    "low_res": ({"low_res": {}}, [noise(1, SIDE, SIDE, 3), noise(2, SIDE, SIDE, 3)], {}),
    "noise_level": (LEVELS, [3, 29], {"low_res": noise(1, SIDE, SIDE, 3)}),
    "depth": ({"depth": {}}, [noise(1, 9, 9, 1), noise(2, 9, 9, 1)], {}),
    "neighbours": (
        {"neighbours": {"num_neighbours": 2, "width": 6}}, [noise(1, 2, 6), noise(2, 2, 6)], {},
    ),
    "image_embedding": ({"image_embedding": {"width": 6}}, [noise(1, 6), noise(2, 6)], {}),
    "original_size": ({"sizes": {"width": 6}}, [(5, 9), (9, 5)], {}),
    "crop_top_left": ({"sizes": {"width": 6}}, [(0, 3), (3, 0)], {}),
    "target_size": ({"sizes": {"width": 6}}, [(5, 9), (9, 5)], {}),
    "aesthetic_score": ({"sizes": {"width": 6, "aesthetic_score": True}}, [2.5, 6.5], {}),
}  # fmt: skip
KEYS = {  # what conditioners read, of one example
    "tokens": jnp.zeros((1, 3), jnp.int32),
    "layout": jnp.zeros((1, 8), jnp.int32),
    "segmentation": jnp.zeros((1, SIDE, SIDE), jnp.int32),
    "low_res": jnp.zeros((1, SIDE, SIDE, 3)),
    "noise_level": jnp.zeros(1, jnp.int32),
    "depth": jnp.zeros((1, SIDE, SIDE, 1)),
    "neighbours": jnp.zeros((1, 2, 6)),
    "image_embedding": jnp.zeros((1, 6)),
    "image": jnp.zeros((1, 6, 6, 3)),
    **dict.fromkeys(("original_size", "crop_top_left", "target_size"), jnp.zeros((1, 2), int)),
    "aesthetic_score": jnp.zeros(1),
}


def reading(conditions):
    """A model that is conditioned so, and answers what it is told."""
    conditioner = make_conditioner(conditions)
    shapes = jax.eval_shape(conditioner.init, RNG, KEYS, jnp.zeros(1, bool)).get("params", {})
    params = jax.tree.map(lambda x: jnp.asarray(noise(0, *x.shape)), shapes)
    params = {"unet": {"gain": jnp.array(0.0), "bias": jnp.array(0.0)}, "conditioner": params}
    whole = Denoiser(params, make_schedule(), Reading(), conditioner, "x0")
    return Model(first_stage(), whole, None, {"num_steps": 1}, SIDE)


@pytest.mark.parametrize("argument", TOLD)
def test_a_condition_reaches_the_network(argument):
    conditions, values, others = TOLD[argument]
    made = reading(conditions)
    start = {"z_T": noise(4, 1, SIDE, SIDE, 3)} if argument == "aesthetic_score" else {}
    one, other = (
        made.sample(RNG, mode="single", **{**others, **start, argument: value}) for value in values
    )
    assert np.abs(one - other).max() > 1e-3
    told = [made.condition(rng=RNG, **{**others, argument: value}) for value in values]
    answer = made.denoise(jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros(1), told[0])
    CLOSE(one, made.decode(answer))  # a sample is told the same as `condition` says
    leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(each)]) for each in told]
    assert np.abs(leaves[0] - leaves[1]).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["original_size", "crop_top_left", "target_size", "aesthetic_score"]
)
def test_the_unconditional_may_have_other_sizes(name):
    conditions, (value, other), _ = TOLD[name]
    made = reading(conditions)

    def pictures(scale, **given):
        given |= {name: value, "z_T": noise(4, 1, SIDE, SIDE, 3)}
        return made.sample(RNG, mode="single", guidance_scale=scale, **given)

    plain = pictures(1.0)
    CLOSE(pictures(3.0, **{f"negative_{name}": value}), plain)  # nothing to steer away from
    assert np.abs(pictures(3.0, **{f"negative_{name}": other}) - plain).max() > 1e-3
    if name == "aesthetic_score":  # the unconditional has another one by default
        assert value == 2.5
        CLOSE(pictures(3.0), plain)
        with pytest.raises(ValueError, match="refiner"):
            made.sample(RNG, mode="single")
    with pytest.raises(ValueError, match=f"2 of negative_{name} for 1 prompts"):
        pictures(3.0, **{f"negative_{name}": np.array([other, other])})
    with pytest.raises(ValueError, match=f"negative_{name} given, but this model has no {name}"):
        reading({"depth": {}}).sample(RNG, depth=noise(1, 2, 2, 1), **{f"negative_{name}": value})


def test_a_picture_that_is_a_condition_may_be_the_start_as_well():
    sizes = {"image_size": 6, "patch_size": 3, "width": 6, "depth": 1, "num_heads": 2}
    made = reading({"clip_image": {**sizes, "projection_dim": 6}})
    kept = made.sample(RNG, image=IMAGES[:1], strength=0.0, mode="single")
    CLOSE(kept, IMAGES[:1])
    # As a condition alone it has any size, also one that f doesn't divide.
    made = made.replace(first_stage=made.first_stage.replace(module=Coarse(3)))
    with pytest.raises(ValueError, match="parallel mode"):  # before anything is compiled
        made.sample(RNG, image=noise(1, 9, 7, 3), mode="none")


class Both(Reading):
    """A network whose answer depends on z_t, and on what it is told."""

    @nn.compact
    def __call__(self, z_t, t, conditioning=None, train=False):
        return 0.5 * z_t + 20 * Reading.__call__(self, z_t, t, conditioning, train)


def mixing(conditions, bias):
    """A model that is conditioned so, and reads it with this bias."""
    made = reading(conditions)
    params = {**made.denoiser.params, "unet": {"gain": jnp.array(0.0), "bias": jnp.array(bias)}}
    return made.replace(denoiser=made.denoiser.replace(network=Both(), params=params))


def test_a_negative_prompt_has_the_sizes_of_the_unconditional():
    made = reading({**TEXT, "sizes": {"width": 6}}).replace(tokenizer=model(TEXT).tokenizer)

    def pictures(size):
        options = {"negative_original_size": size, "negative_prompts": "red", "mode": "single"}
        return made.sample(RNG, "red", guidance_scale=3.0, original_size=(5, 9), **options)

    assert np.abs(pictures((5, 9)) - pictures((9, 5))).max() > 1e-3


def test_a_perpendicular_negative_prompt_is_only_avoided_where_there_is_one():
    made = reading(TEXT).replace(tokenizer=model(TEXT).tokenizer)
    options = {"mode": "single", "guidance_scale": 3.0}
    other = made.replace(defaults={**made.defaults, "perpendicular": 1.0})
    images = [each.sample(RNG, "red", **options) for each in (made, other)]
    np.testing.assert_array_equal(*images)


def test_a_call_with_a_refiner_is_two_calls_bitwise():
    """Each model gets the conditions that it reads, and the second one the latents."""
    sizes = {"image_embedding": {"width": 6}, "sizes": {"width": 6}}
    base, other = mixing(sizes, 0.0), mixing({"sizes": {"width": 6, "aesthetic_score": True}}, 0.3)
    options = {"sampler": "euler_ancestral", "num_steps": 5, "guidance_scale": 2.0}
    options |= {"mode": "single", "num_images": 2, "original_size": (3, 9)}
    first = {
        "image_embedding": noise(1, 6),
        "target_size": (7, 2),
        "z_T": noise(2, 2, SIDE, SIDE, 3),
    }
    first |= {"negative_target_size": (2, 7)}
    second = {"aesthetic_score": 3.0, "negative_aesthetic_score": 9.0}
    whole = base.sample(RNG, **options, **first, **second, refiner=(other, 0.4))
    between = base.sample(RNG, **options, **first, end=0.4)
    want = other.sample(RNG, **options, **second, z_T=between, start=0.4)
    np.testing.assert_array_equal(whole, want)
    left = base.sample(RNG, **options, **first, **second, refiner=(other, 0.4), end=0.2)
    np.testing.assert_array_equal(
        left, other.sample(RNG, **options, **second, z_T=between, start=0.4, end=0.2)
    )
    given = {**options, "image_embedding": noise(1, 6)}
    slow = other.replace(defaults={"spacing": "leading"})
    for changes, message in (
        ({"refiner": (other, 1.0)}, r"refiner is a pair of a model and a share .* not .*1\.0\)"),
        ({"refiner": (noise(1, 6), 0.4)}, "refiner is a pair of a model and a share of the noise"),
        ({"refiner": (slow, 0.4)}, "refiner starts at timestep 200, but the model stops at 399"),
        ({"refiner": (other, 0.01)}, "no step lies between start=0.01 and end=0"),
        (
            {"refiner": (other, 0.4), "image": IMAGES[:1], "strength": 0.5},
            "strength doesn't go with a refiner",
        ),
        ({"refiner": (other, 0.4), "depth": noise(1, 2, 2, 1)}, "depth given, but this model"),
        ({"refiner": (other.replace(denoiser=None), 0.4)}, "this model has no denoiser"),
    ):
        with pytest.raises(ValueError, match=message):
            base.sample(RNG, **{**given, **changes})


class Counter:
    """A progress function with a total."""

    total, calls = None, 0

    def __call__(self, t):
        self.calls += 1


def test_progress_with_a_refiner_reaches_the_total_of_both_models():
    sizes = {"sizes": {"width": 6}}
    base, other = mixing(sizes, 0.0), mixing(sizes, 0.3)
    counter = Counter()
    base.sample(RNG, num_steps=5, mode="single", refiner=(other, 0.4), progress=counter)
    assert counter.calls == counter.total == 5


def test_a_refiner_fills_the_hole_of_the_first_model():
    sizes = {"sizes": {"width": 6}}
    base, other = mixing(sizes, 0.0), mixing(sizes, 0.3)
    hole = np.zeros((1, SIDE, SIDE, 1), np.float32)
    hole[:, :2] = 1
    given = {"image": IMAGES[:1], "mask": hole, "num_steps": 5, "mode": "single"}
    images = base.sample(RNG, **given, refiner=(other, 0.4))
    np.testing.assert_array_equal(images[:, 2:], IMAGES[:1, 2:])
    alone = base.sample(RNG, **given)
    assert np.abs(images - alone)[:, :2].max() > 1e-3
    between = base.sample(RNG, **given, end=0.4)  # where the picture is as noisy as the hole
    assert np.abs(between - base.encode(IMAGES[:1]))[:, 2:].mean() > 0.1
    varied = {
        **given,
        "mask": None,
        "start": 0.7,
    }  # without mask it is the first one's alone
    between = base.sample(RNG, **varied, end=0.4)
    want = other.sample(RNG, num_steps=5, mode="single", z_T=between, start=0.4)
    np.testing.assert_array_equal(base.sample(RNG, **varied, refiner=(other, 0.4)), want)


def test_a_call_that_goes_on_draws_other_noise():
    """From black latents, of a network that expects black: the result is the noise of one step."""
    made = model(CLASS)
    params = jax.tree.map(jnp.zeros_like, made.denoiser.params)
    made = made.replace(denoiser=made.denoiser.replace(params=params))
    given = {"class_labels": [1] * 30, "eta": 1.0, "num_steps": 5, "mode": "single"}
    given["z_T"] = np.zeros((30, SIDE, SIDE, 3), np.float32)
    first = made.sample(RNG, end=0.9, **given)
    second = made.sample(RNG, start=0.9, end=0.7, **given)
    assert min(first.std(), second.std()) > 0.1
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_a_condition_has_the_size_of_the_picture():
    told = reading({"depth": {}}).condition(depth=noise(1, 9, 9, 1), image_size=(2, 3))
    assert told.concat.shape == (1, 2, 3, 1)


class Channels(UNet):
    """A classifier whose scores are the channels' means."""

    def __call__(self, z_t, t, conditioning=None, train=False):
        return 3 * z_t.mean((1, 2))


TARGET = noise(3, 1, 2, 2, 3)
GUIDES = {
    "classifier": ({}, {"classifier": "it", "classifier_labels": [0]}),
    "classifier_labels": (
        {"classifier": "it", "classifier_labels": [0]},
        {"classifier": "it", "classifier_labels": [2]},
    ),
    "classifier_scale": (
        {"classifier": "it", "classifier_labels": [0]},
        {"classifier": "it", "classifier_labels": [0], "classifier_scale": 5.0},
    ),
    "target": ({}, {"target": TARGET}),
    "target_scale": ({"target": TARGET}, {"target": TARGET, "target_scale": 0.2}),
}


@pytest.mark.parametrize("argument", GUIDES)
def test_a_guide_changes_the_pictures(argument):
    classifier = NoisyClassifier({}, make_schedule(), Channels(3))
    made = model(TEXT)
    made = made.replace(denoiser=made.denoiser.replace(network=Mixing()))

    def pictures(given):
        given = (
            {k: classifier if isinstance(v, str) else v for k, v in given.items()} if given else {}
        )
        return sample(made=made, num_steps=2, **given)

    one, other = (pictures(given) for given in GUIDES[argument])
    assert np.abs(one - other).max() > 1e-3


class Lossy(Identity):
    """A first stage that halves what it decodes."""

    def decode(self, z):
        return 0.5 * z


def test_pixels_outside_the_hole_never_went_through_the_first_stage():
    made = model(TEXT)
    made = made.replace(first_stage=made.first_stage.replace(module=Lossy(3)))
    hole = np.zeros((1, SIDE, SIDE, 1), np.float32)
    hole[:, :, 2:] = 1.0
    images = sample(made=made, image=IMAGES[:1], mask=hole)
    np.testing.assert_array_equal(images[:, :, :2], np.repeat(IMAGES[:1, :, :2], 2, 0))


class Coarse(Identity):
    """A first stage that halves both sides."""

    downsampling = 2

    def encode(self, x):
        return x[:, ::2, ::2]

    def decode(self, z):
        return jnp.repeat(jnp.repeat(z, 2, 1), 2, 2)


def test_a_latent_with_any_pixel_of_the_hole_is_made_anew():
    made = model(TEXT)
    made = made.replace(first_stage=made.first_stage.replace(module=Coarse(3)), image_size=2 * SIDE)
    hole = np.zeros((1, 2 * SIDE, 2 * SIDE, 1), np.float32)
    hole[:, 3, 4] = 1.0
    known = np.full((1, 2 * SIDE, 2 * SIDE, 3), 0.9, np.float32)
    images = sample(made=made, image=known, mask=hole, guidance_scale=1.0)
    CLOSE(images[:, 3, 4], pixels(told(*PROMPTS))[:, 1, 2])


def test_previews_are_estimates_of_the_latents():
    """Without the rows that fill a batch: three images are computed as four."""
    seen, prompts = [], (*PROMPTS, "green")
    sample(prompts, preview=lambda t, z_0: seen.append((int(t), z_0)), guidance_scale=1.0)
    ((t, z_0),) = seen
    assert t == 999
    CLOSE(z_0 / SCALE + SHIFT, pixels(told(*prompts)))


class Telling(Identity):
    """A first stage whose pictures tell the height of the latent."""

    def decode(self, z):
        return jnp.full_like(z, z.shape[1] / 10)


class Told(Identity):
    """A first stage whose latents tell the height of the picture."""

    def encode(self, x):
        return jnp.full_like(x, x.shape[1] / 10)


class Copying(Answering):
    """A network that answers the latents beside its own."""

    def __call__(self, z_t, t, conditioning=None, train=False):
        return conditioning.concat[..., :3]


def test_the_decoder_sees_tiles_as_well():
    made = model(TEXT)
    made = made.replace(
        first_stage=made.first_stage.replace(module=Telling(3)),
        denoiser=made.denoiser.replace(network=Mixing()),
    )
    CLOSE(sample(made=made, guidance_scale=1.0, tile_size=2, tile_overlap=0), 0.2)


@pytest.mark.parametrize("filled", [False, True])
def test_a_picture_that_is_changed_or_filled_is_encoded_in_tiles(filled):
    made, tiles = model(TEXT), {"tile_size": 2, "tile_overlap": 0}
    given = {"image": np.zeros((1, SIDE, SIDE, 3), np.float32), "strength": 0.0}
    if filled:  # by a network that sees the picture as a condition
        conditioner = make_conditioner({"masked_image": {}})
        denoiser = made.denoiser.replace(network=Copying(), conditioner=conditioner)
        made = made.replace(denoiser=denoiser)
        given["mask"] = np.ones((1, SIDE, SIDE, 1), np.float32)
        del given["strength"]
    made = made.replace(first_stage=made.first_stage.replace(module=Told(3)))
    prompts = None if filled else "red"
    for more, height in (({}, SIDE), (tiles, 2)):
        CLOSE(made.sample(RNG, prompts, mode="single", **given, **more), height / 10)
