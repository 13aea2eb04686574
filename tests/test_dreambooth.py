"""DreamBooth: pictures of the class are drawn once, and their loss is added to the subject's."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_stop import compiled_once
from tiny import make_batch, make_config

import latent_diffusion as ldm
from latent_diffusion import data
from latent_diffusion.core.rng import example_keys
from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import class_pictures, loop
from latent_diffusion.training.batch_spec import batch_spec

OWN = {
    "init_from": "base",
    "dreambooth.class_prompt": "red cat",
    "dreambooth.num_images": 6,
    "first_stage.cache": False,
    "batch_size": 4,
}


def dreambooth(**fields):
    return make_config("denoising", **{**OWN, **fields})


def batches(value, size=2):
    """Endless batches of pictures of one value."""
    image = np.full((size, 4, 4, 3), value, np.float32)
    return itertools.repeat({"image": image, "tokens": np.full((size, 4), value, np.int32)})


def test_a_loss_is_of_both_halves():
    """diffusers' script: mean over the subject + prior_weight · mean over the class."""
    config = dreambooth(**{"dreambooth.prior_weight": 0.25, "batch_size": 8})
    joined = next(class_pictures.with_class(config, batches(0, 4), batches(1, 4)))
    assert joined["tokens"][:, 0].tolist() == [0] * 4 + [1] * 4
    task = TASKS["denoising"](config)
    state, constants = jax.jit(lambda rng: task.init(rng, batch_spec(config)))(jax.random.key(0))
    out = state.params["unet"]["out_2"]
    out["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), out["kernel"].shape)
    batch = {**make_batch(config), "example_weight": joined["example_weight"]}

    @jax.jit
    def loss(batch):
        return task._loss(
            state.params, None, constants, batch, example_keys(jax.random.key(2), 8, None)
        )

    seen = loss({k: jnp.asarray(x) for k, x in batch.items()})
    simple = np.asarray(seen["simple"])
    assert np.std(simple) > 0
    want = simple[:4].mean() + 0.25 * simple[4:].mean()
    np.testing.assert_allclose(seen["loss"].mean(), want, rtol=1e-5)


def test_pictures_of_the_class_are_drawn_once(tmp_path):
    tokenizer, drawn = WordTokenizer.train(["red blue cat dog"], 16, 4), []

    def show(batch, rng):
        drawn.append(batch["tokens"])
        return {"samples": jnp.tanh(jax.random.uniform(rng, (4, 16, 16, 3)))}

    def make(config, goes_on=False):
        return class_pictures.make_source(config, tmp_path, goes_on, tokenizer, show)

    with pytest.raises(ValueError, match=r"has lost its class-\*.npy"):
        make(dreambooth(), goes_on=True)
    source = make(dreambooth())
    assert len(source) == 6 and len(drawn) == 2  # two batches of four
    for tokens in drawn:
        np.testing.assert_array_equal(tokens, tokenizer(["red cat"] * 4))
    pictures = np.stack([source[i]["image"] for i in range(6)])
    assert pictures.dtype == np.uint8 and len(np.unique(pictures, axis=0)) == 6  # no noise twice
    assert source[5]["caption"] == "red cat"
    fields = {"data.crop": "random", "data.shorter_side": 24}  # of the subject's pictures
    transform = data.make_transform(dreambooth(**fields).data, True, tokenizer, as_bytes=True)
    np.testing.assert_array_equal(transform(source[5])["image"], pictures[5])
    # A run that is started again, or goes on with other fields, finds them.
    again = [make(dreambooth()), make(dreambooth(seed=7), goes_on=True)]
    assert len(drawn) == 2
    for source in again:
        np.testing.assert_array_equal([source[i]["image"] for i in range(6)], pictures)
    # Others are drawn for other fields, and take the place of the first.
    other = make(dreambooth(seed=7, **{"dreambooth.num_images": 8}))
    assert len(other) == 8 and len(drawn) == 4 and len([*tmp_path.glob("class-*")]) == 1
    assert np.abs(pictures.astype(int) - np.stack([other[i]["image"] for i in range(6)])).max() > 9
    fields = {"seed": 7, "dreambooth.num_images": 8, "init_from": "another"}
    make(dreambooth(**fields))
    make(dreambooth(**fields, **{"data.image_size": 8}))
    assert len(drawn) == 8
    several = make(dreambooth(**{"dreambooth.class_prompt": "red cat; dog"}))
    assert [several[i]["caption"] for i in range(3)] == ["red cat", "dog", "red cat"]
    np.testing.assert_array_equal(drawn[-2], tokenizer(["red cat", "dog"] * 2))


def test_the_files_of_a_run_stay_when_drawing_fails(tmp_path):
    def show(batch, rng):
        raise RuntimeError("no memory")

    given = (WordTokenizer.train(["red cat"], 8, 4), show)
    with pytest.raises(RuntimeError, match="no memory"):
        class_pictures.make_source(dreambooth(), tmp_path, False, *given)
    assert not [*tmp_path.iterdir()]


FAULTS = {
    "init_from": ({"init_from": ""}, "needs a model to draw with: name it by init_from"),
    "control": ({"control": "edges"}, "needs task='denoising' and no control"),
    "cache": ({"first_stage.cache": True}, "needs first_stage.cache=False"),
    "texts": ({"cache_texts": True}, "needs cache_texts=False"),
    "shards": ({"data.name": "latents"}, "needs pictures, not their latents"),
    "buckets": ({"data.bucket_step": 4}, "needs data.bucket_step=0"),
    "odd": ({"batch_size": 5}, "needs an even batch_size: half of a batch is of the class"),
    "prior": ({"dreambooth.prior_weight": -0.5}, "needs dreambooth.prior_weight of at least 0"),
    "few": ({"dreambooth.num_images": 1}, "needs dreambooth.num_images of at least 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_can_draw_no_class_is_refused(name):
    fields, message = FAULTS[name]
    with pytest.raises(ValueError, match=f"^dreambooth.class_prompt='red cat' {message}"):
        class_pictures.check(dreambooth(**fields))


def test_half_a_batch_divides_over_the_processes(monkeypatch):
    monkeypatch.setattr(class_pictures.parallel, "process_shard", lambda *_: (0, 2))
    class_pictures.check(dreambooth(batch_size=8))
    with pytest.raises(ValueError, match=r"needs half of batch_size=6 to divide over 2 processes$"):
        class_pictures.check(dreambooth(batch_size=6))


def test_a_model_with_other_conditions_than_text_can_not_draw_the_class():
    config = dreambooth()
    class_pictures.check(config)
    with config.unlocked():
        config.conditioners.class_label = {"num_classes": 3}
    with pytest.raises(ValueError, match="needs a model that is conditioned on text alone"):
        class_pictures.check(config)


def test_a_run_draws_its_class_and_trains_on_both(tmp_path):
    pixels = {"autoencoder.regularization": "identity", "num_steps": 1, "sampling.num_steps": 1}
    pixels |= {
        "first_stage.cache": False,
        "data.image_size": 8,
        "log.num_images": 1,
        "parallel.mode": "single",
    }
    loop.train(make_config("denoising", **pixels), tmp_path / "base")
    fields = {**OWN, **pixels, "init_from": str(tmp_path / "base")}
    fields["optimizer.frozen"] = ("conditioner/",)
    negative = make_config("denoising", **fields, **{"dreambooth.prior_weight": -1.0})
    with pytest.raises(ValueError, match="prior_weight of at least 0"):
        loop.train(negative, tmp_path / "subject")
    assert not [*tmp_path.glob("subject/class-*")]
    with compiled_once():
        loop.train(make_config("denoising", **fields), tmp_path / "subject")
        (path,) = (tmp_path / "subject").glob("class-*.npy")
        assert np.load(path).shape == (6, 8, 8, 3)
        (tmp_path / "alone").mkdir()
        shutil.copy(path, tmp_path / "alone")
        alone = make_config("denoising", **fields, **{"dreambooth.prior_weight": 0.0})
        loop.train(alone, tmp_path / "alone")
    before, both, subject = (
        flatten_dict(ldm.load(tmp_path / name).denoiser.params, sep="/")
        for name in ("base", "subject", "alone")
    )
    for name, x in before.items():
        if name.startswith("conditioner/"):
            np.testing.assert_array_equal(both[name], x)
    moved = {name for name, x in before.items() if not np.array_equal(x, both[name])}
    assert {"unet/out_2/kernel", "unet/input_blocks_0_0/kernel"} <= moved
    assert np.abs(both["unet/out_2/kernel"] - subject["unet/out_2/kernel"]).max() > 1e-5
