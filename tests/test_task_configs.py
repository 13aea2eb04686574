"""Every task of the paper on the embedded data: its config, its batches, two steps of training."""

import functools
import itertools
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import openmoji_text_64
from latent_diffusion import data
from latent_diffusion.evaluate.generate import conditions_of
from latent_diffusion.generation.model import Model
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

NAMES = (
    "unconditional",
    "class",
    "layout",
    "semantic",
    "super_resolution",
    "inpainting",
    "variation",
    "retrieval",
)


def tiny(name):
    """The smoke variant with a smaller first stage (f=2) and U-Net."""
    config = import_module(f"configs.openmoji_{name}").get_config("smoke")
    config.data.image_size = 16
    small = {"channel_mult": (1, 1), "num_groups": 4, "embed_dim": 2, "z_channels": 2}
    config.autoencoder.update(small)
    config.unet.update({"model_channels": 8, "channel_mult": (1,), "num_groups": 4})
    config.data.low_res_factor = 2
    if "spatial_rescaler" in config.conditioners:
        config.conditioners.spatial_rescaler.num_stages = 1
    return config


def started(task, spec):
    """A state and constants as `init` makes them, but with numbers that needn't be compiled."""
    rng = np.random.default_rng(0)
    state, constants = jax.eval_shape(task.init, jax.random.key(0), spec)
    params, constants = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), (state.params, constants)
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    return zeros.replace(params=params, ema_params=params), constants


@functools.cache
def made(name):
    """Task, two batches of its data, and the shapes that the loop expects of them."""
    config = tiny(name)
    source = data.make_source(config.data, "train")
    transform = data.make_transform(config.data, train=True)
    batches = data.iterate(source, transform, batch_size=config.batch_size, seed=0)
    return TASKS[config.task](config), list(itertools.islice(batches, 2)), batch_spec(config)


@pytest.mark.parametrize("name", NAMES)
def test_the_data_makes_the_batches_that_the_task_reads(name):
    task, batches, spec = made(name)
    for batch in batches:
        for key, wanted in spec.items():
            assert (batch[key].shape, batch[key].dtype) == (wanted.shape, wanted.dtype), key
    state, constants = jax.eval_shape(task.init, jax.random.key(0), spec)
    step = functools.partial(jax.eval_shape, task.train_step, state, constants)
    after, metrics = step(batches[0], jax.random.key(1))
    assert metrics["loss"].shape == ()
    assert jax.tree.structure(after) == jax.tree.structure(state)
    without = [key for key in spec if key != "image"][:1]
    for key in without:  # and it does read them
        with pytest.raises(ValueError, match=f"conditioning needs {key}; the batch has"):
            step({k: v for k, v in batches[0].items() if k != key}, jax.random.key(1))


# One that attends to a trained encoder's tokens, one beside the latent through the first stage.
@pytest.mark.parametrize("name", ["layout", "inpainting"])
def test_a_task_takes_two_steps(name):
    task, batches, spec = made(name)
    state, constants = started(task, spec)
    step = jax.jit(task.train_step)
    before = state.params
    for batch in batches:
        state, metrics = step(state, constants, batch, jax.random.key(1))
    assert np.isfinite(float(metrics["loss"]))
    for part in before:
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before[part], state.params[part])
        assert all(jax.tree.leaves(moved)), part


@pytest.mark.parametrize("name", NAMES)
def test_the_full_config_has_the_sizes_of_its_data(name):
    config = import_module(f"configs.openmoji_{name}").get_config()
    spec = batch_spec(config)
    assert spec["image"].shape == (config.batch_size, 32, 32, 3)
    if config.data.layout.vocab_size:
        fields = config.data.layout
        length = 3 * fields.max_objects + 2 * fields.encode_crop
        assert config.conditioners.layout.max_length == length
        assert config.conditioners.layout.vocab_size == fields.vocab_size


def test_evaluation_tells_a_model_what_belongs_together():
    config = tiny("super_resolution")
    config.conditioners.class_label = {"num_classes": 9}
    conditioner = make_conditioner(config.conditioners)
    model = Model(denoiser=Denoiser({}, make_schedule(), UNet(), conditioner, "v"))
    source = data.make_source(config.data, "test")
    transform = data.make_transform(config.data, train=False)
    told = conditions_of(model, source, transform, len(source) + 5, seed=3)
    assert set(told) == {"low_res", "class_labels"}
    labels, pictures = told["class_labels"][:200], told["low_res"][:200]
    own = {transform(source[i])["low_res"].tobytes(): i for i in range(len(source))}
    places = [own[picture.tobytes()] for picture in pictures]
    assert sorted(places[: len(source)]) == list(range(len(source)))  # each once, then again
    assert len(places) == len(source) + 5
    assert labels == [source[i]["class_label"] for i in places]


def test_evaluation_gives_every_picture_a_hole_of_its_own():
    config = tiny("inpainting")
    conditioner = make_conditioner(config.conditioners)
    model = Model(denoiser=Denoiser({}, make_schedule(), UNet(), conditioner, "v"))
    source = data.make_source(config.data, "test")
    transform = data.make_transform(config.data, train=False)
    first, again = (conditions_of(model, source, transform, 9, seed=3)["mask"] for _ in range(2))
    assert len(np.unique(first[:9], axis=0)) == 9
    np.testing.assert_array_equal(first[:9], again[:9])


@pytest.mark.parametrize(("variant", "latent"), [("", (16, 16, 8)), ("smoke", (8, 8, 4))])
def test_the_experiment_at_64_pixels_fits_its_first_stage(variant, latent):
    config = openmoji_text_64.get_config(variant)
    task, spec, rng = TASKS[config.task](config), batch_spec(config), jax.random.key(0)
    state, constants = jax.eval_shape(task.init, rng, spec)
    encoded = jax.eval_shape(lambda c, x: c.first_stage.encode(x), constants, spec)
    assert encoded.shape[1:] == latent
    maps = config.conditioners.word_map
    assert (maps.height, maps.width) == latent[:2]
    _, metrics = jax.eval_shape(task.train_step, state, constants, spec, rng)
    assert metrics["loss"].shape == ()
