"""The experiments of Stable Diffusion XL: sizes, conditions and what is trained."""

import importlib

import jax
import pytest

from latent_diffusion.runtime.parallel import count_flops
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

SIZES = {"original_size", "crop_top_left", "target_size"}
# config -> parameters of the U-Net, of the text encoders (CLIP-L without its last layer and norm),
# and what a batch has
MODELS = {
    "sdxl": (2_567_463_684, 115_971_072 + 694_659_840, {"tokens", *SIZES}),
    "sdxl_refiner": (
        *(2_259_526_660, 694_659_840),
        {"tokens", "aesthetic_score", *SIZES} - {"target_size"},
    ),
}


def started(name, **changes):
    """The task, and shapes of its state, constants and batch."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.batch_size = 1
    config.update_from_flattened_dict(changes)
    task, spec = TASKS[config.task](config), batch_spec(config)
    return task, (*jax.eval_shape(task.init, jax.random.key(0), spec), spec)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_the_released_sizes_with_frozen_encoders(name):
    unet, encoders, keys = MODELS[name]
    _, (state, constants, spec) = started(name)
    assert size(state.params["unet"]) == unet
    assert not jax.tree.leaves(state.params["conditioner"])
    assert size(constants.conditioner) == encoders
    assert set(spec) == {"image", *keys}


def test_a_step_at_1024_takes_the_flops_that_are_known():
    """20.3 TFLOP of the U-Net for one picture, and 5.0 of encoders and first stage."""
    task, inputs = started("sdxl", **{"unet.remat": "none"})
    step = count_flops(task.train_step, *inputs, jax.random.key(0))
    assert abs(step / (20.3e12 + 5.0e12) - 1) < 0.1


def test_an_adaptation_trains_its_factors_alone():
    _, (state, constants, _) = started("sdxl_lora")
    assert set(state.params) == {"lora"} and size(state.params) < 0.02 * MODELS["sdxl"][0]
    assert size(constants.base["unet"]) == MODELS["sdxl"][0]
    assert size(constants.base["conditioner"]) == MODELS["sdxl"][1]
