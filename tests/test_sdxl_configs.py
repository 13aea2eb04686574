"""The experiments of Stable Diffusion XL: sizes, conditions and what is trained."""

import importlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from latent_diffusion import data
from latent_diffusion.data.tokenizers.word import WordTokenizer
from latent_diffusion.nets.conditioners import encoded_apart
from latent_diffusion.runtime.parallel import count_flops
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.batches import train_batches

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


def test_the_unet_in_a_step_at_1024_takes_the_flops_that_are_known():
    """20.3 TFLOP for one picture, forwards and backwards; latents and texts are encoded already."""
    task, (state, constants, spec) = started("sdxl", **{"unet.remat": "none"})
    encoded = jax.eval_shape(
        lambda frozen, batch: {
            "moments": frozen.first_stage.moments(batch["image"]),
            **encoded_apart(task.denoiser.conditioner, frozen.conditioner, batch),
        },
        constants,
        spec,
    )
    batch = {**spec, **encoded}
    step = count_flops(task.train_step, state, constants, batch, jax.random.key(0))
    assert abs(step / 20.3e12 - 1) < 0.1


# The same networks, but narrow, with two levels, and latents of 8 x 8.
NARROW = {
    "data.image_size": 64, "batch_size": 2, "unet.model_channels": 32, "unet.num_res_blocks": 1,
    "unet.remat": "none", "autoencoder.channels": 32, "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 1e-2,
}  # fmt: skip
ENCODER = {"width": 64, "num_heads": 1, "depth": 2, "vocab_size": 9, "max_length": 5}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures with captions and scores, none of them a square."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(4):
        colour = (60 * i, 90, 200 - 50 * i)
        Image.new("RGB", (100 + 10 * i, 72), colour).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a red cube", "aesthetic_score": 4 + i})
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner", "sdxl_lora"])
def test_a_narrow_model_takes_a_step(name, pictures):
    """Its parameters move, the frozen ones don't, and the sizes of training's data count."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(NARROW)
    depth = config.unet.transformer_depth
    with config.ignore_type(), config.unlocked():
        config.unet.transformer_depth = 1 if isinstance(depth, int) else (1, 1)
        config.unet.channel_mult = config.unet.channel_mult[:2]
        config.tokenizer.max_length = ENCODER["max_length"]
        for encoder in {"clip_text", "clip_text_2"} & set(config.conditioners):
            config.conditioners[encoder].update({**ENCODER, "empty": (7, 8)})
        config.conditioners.sizes.width = 4
    task, spec = TASKS[config.task](config), batch_spec(config)
    rng = np.random.default_rng(0)
    state, constants = jax.tree.map(
        lambda x: rng.normal(0, 0.05, x.shape).astype(x.dtype),
        jax.eval_shape(task.init, jax.random.key(0), spec),
    )
    state = state.replace(step=np.int32(1), opt_state=task.tx.init(state.params))
    config.data.update({"dir": str(pictures), "test_fraction": 0.0})
    assert config.data.name == "image_folder"
    source = data.make_source(config.data, "train")
    tokenizer = WordTokenizer.train(["a red cube"], ENCODER["vocab_size"], ENCODER["max_length"])
    transform = data.make_transform(config.data, train=True, tokenizer=tokenizer, as_bytes=True)
    batch = next(train_batches(config, source, transform))
    for key in spec.keys() - {"image"}:
        assert (batch[key].shape, batch[key].dtype) == (spec[key].shape, spec[key].dtype), key
    assert (batch["original_size"][:, 1] >= 100).all() and (
        batch["original_size"][:, 0] == 72
    ).all()
    assert (batch["crop_top_left"] > 0).any()
    if "aesthetic_score" in batch:
        assert set(batch["aesthetic_score"]) <= {4.0, 5.0, 6.0, 7.0}
    batch["moments"] = rng.standard_normal((2, 8, 8, 8), np.float32)  # in place of the picture
    step = jax.jit(task.train_step)
    after, metrics = step(state, constants, batch, jax.random.key(1))
    assert np.isfinite(float(metrics["loss"]))
    (trained,) = (part for part in state.params if jax.tree.leaves(state.params[part]))
    assert trained == ("lora" if name == "sdxl_lora" else "unet")
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(jax.tree.leaves(moved))
    frozen = constants.base["conditioner"] if name == "sdxl_lora" else constants.conditioner
    encoders = {"clip_text_2"} if name == "sdxl_refiner" else {"clip_text", "clip_text_2"}
    assert {key for key, tree in frozen.items() if jax.tree.leaves(tree)} == encoders
    for key in spec.keys() & (SIZES | {"aesthetic_score"}):
        other = {**batch, key: 100 + batch[key]}
        assert step(state, constants, other, jax.random.key(1))[1]["loss"] != metrics["loss"], key


def test_an_adaptation_trains_its_factors_alone():
    _, (state, constants, _) = started("sdxl_lora")
    assert set(state.params) == {"lora"} and size(state.params) < 0.02 * MODELS["sdxl"][0]
    assert size(constants.base["unet"]) == MODELS["sdxl"][0]
    assert size(constants.base["conditioner"]) == MODELS["sdxl"][1]
