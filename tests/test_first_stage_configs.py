"""The experiments of perceptual compression: sizes of the released models, and that they build."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.models.first_stage import make_autoencoder
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.dry_run import dry_run

# Released models: millions of parameters; the paper's other rows: None.
SIZES = {
    "kl_f2": None,
    "kl_f4": 55.31,
    "kl_f8": 83.65,
    "kl_f16": 69.61,
    "kl_f16:c8": None,
    "kl_f32": 103.88,
    "kl_f32:c16": None,
    "vq_f2": None,
    "vq_f2:n64": None,
    "vq_f4": 55.32,
    "vq_f4:n256": None,
    "vq_f4_noattn": 53.22,
    "vq_f8": 67.72,
    "vq_f8_n256": 67.65,
    "vq_f16": 69.59,
    "vq_f32": None,
}
OWN = [f"openmoji_first_stages:{name}" for name in ("kl_f4", "kl_f8", "vq_f4", "vq_f8")]


def get(name):
    file, _, variant = name.partition(":")
    module = importlib.import_module(f"configs.{file}")
    return module.get_config(variant) if variant else module.get_config()


@pytest.mark.parametrize("name", [*SIZES, *OWN])
def test_config_builds_with_its_downsampling_and_size(name):
    config = get(name)
    module = make_autoencoder(config.autoencoder)
    assert isinstance(module, Autoencoder)
    assert name.rpartition("s:")[2].startswith(module.regularization)
    assert f"f{module.downsampling}" in name
    x = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    millions = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) / 1e6
    assert SIZES.get(name) in (None, round(millions, 2))
    assert TASKS[config.task](config).autoencoder == module


# Batch, first step of the discriminator, its weight and its layers (the released models).
RECIPES = {
    "kl_f4": (10, 50_001, 0.5, 3),
    "kl_f8": (4, 50_001, 0.5, 3),
    "kl_f16": (6, 50_001, 0.5, 3),
    "kl_f32": (6, 50_001, 0.5, 3),
    "vq_f4": (8, 0, 0.75, 3),
    "vq_f4_noattn": (8, 11, 0.75, 3),
    "vq_f8": (10, 1, 0.6, 2),
    "vq_f8_n256": (10, 250_001, 0.75, 3),
    "vq_f16": (14, 250_001, 0.75, 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_that_of_the_released_model(name):
    config, has_codes = get(name), name.startswith("vq")
    loss, adam, batch = config.autoencoding, config.optimizer, config.batch_size
    layers = loss.discriminator.num_layers
    assert (batch, loss.disc_start, loss.adversarial_weight, layers) == RECIPES[name]
    assert loss.adversarial_start == loss.disc_start and loss.disc_loss == "hinge"
    assert (loss.reduction, loss.reg_weight) == (("mean", 1.0) if has_codes else ("sum", 1e-6))
    assert loss.learn_logvar == (not has_codes)
    assert (adam.name, adam.b1, adam.b2, adam.learning_rate) == ("adam", 0.5, 0.9, 4.5e-6 * batch)


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'c4'; known: c8"):
        get("kl_f16:c4")


def test_the_discriminators_have_the_released_sizes():
    for name, millions in (("kl_f4", 2.77), ("vq_f8", 0.66)):
        config = get(name)
        row = next(r for r in dry_run(config).splitlines() if r.startswith("discriminator"))
        assert float(row.split()[1]) == millions
