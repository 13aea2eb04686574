"""Every task of the paper on the embedded data: its config, its batches, two steps of training."""

import itertools
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion import data
from latent_diffusion.loop import batch_spec
from latent_diffusion.tasks import TASKS

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


@pytest.mark.parametrize("name", NAMES)
def test_a_task_trains_on_the_batches_of_its_config(name):
    config = tiny(name)
    source = data.make_source(config.data, "train")
    transform = data.make_transform(config.data, train=True)
    batches = data.iterate(source, transform, batch_size=config.batch_size, seed=0)
    spec = batch_spec(config)
    task = TASKS[config.task](config)
    state, constants = started(task, spec)
    step = jax.jit(task.train_step)
    before = state.params
    for batch in itertools.islice(batches, 2):
        for key, wanted in spec.items():
            assert (batch[key].shape, batch[key].dtype) == (wanted.shape, wanted.dtype), key
        state, metrics = step(state, constants, batch, jax.random.key(1))
    assert np.isfinite(float(metrics["loss"]))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before["unet"], state.params["unet"])
    assert any(jax.tree.leaves(moved))


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
