"""Conditions as users give them to `Model.sample`, and what they are told about wrong ones."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import make_config

from latent_diffusion.convert.adapters import ControlWeights
from latent_diffusion.convert.orbax import conditioner_fields
from latent_diffusion.convert.text import of_corners
from latent_diffusion.data.layout import LayoutTokens, Object
from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.data.transforms import to_float
from latent_diffusion.generation import conditions, guides, sampling
from latent_diffusion.generation.model import Model
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.nets.conditioners import CONDITIONERS, make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.runtime.metrics import image_grid

RNG = jax.random.key(5)
SIZE = (8, 8)
FIELDS = {
    "class_label": {"num_classes": 5, "width": 6},
    "layout": {"vocab_size": 26, "max_length": 8, "width": 6, "depth": 0},
    "spatial_rescaler": {"num_classes": 4, "num_stages": 1},
    "low_res": {"num_levels": 40, "max_noise_level": 30, "width": 32},
    "masked_image": {},
    "depth": {},
    "neighbours": {"num_neighbours": 2, "width": 6},
    "image_embedding": {"width": 6},
}
BOX = (0.1, 0.2, 0.6, 0.9)
MASK = np.zeros((*SIZE, 1), np.float32)
MASK[:, 4:] = 1
IMAGE = np.random.default_rng(0).uniform(-1, 1, (*SIZE, 3)).astype(np.float32)
SMALL = IMAGE[::2, ::2]


def batch_of(names, size=SIZE, **given):
    conditioner = make_conditioner({name: FIELDS[name] for name in names})
    latent = (size[0] // 2, size[1] // 2)
    return conditions.batch_of(conditioner, lambda prompts: None, given, size, latent)


def test_every_condition_by_name_for_one_example_or_for_each():
    batch = batch_of(
        list(FIELDS),
        class_labels=[0, 5, 2],
        layout=[(3, BOX), (0, (0, 0, 1, 1))],
        segmentation=np.zeros(SIZE, int),
        low_res=np.stack([SMALL] * 3),
        image=IMAGE,
        mask=MASK,
        depth=np.ones((3, 30, 20, 1)),
        neighbours=np.ones((9, 6)),
        image_embedding=np.ones((3, 6)),
    )
    assert {len(value) for value in batch.values()} == {3}
    assert batch["layout"].dtype == batch["segmentation"].dtype == np.int32
    np.testing.assert_array_equal(batch["layout"][0, :8:3], [3, 0, 0])  # classes, then the crop
    np.testing.assert_array_equal(batch["noise_level"], [20] * 3)  # where nothing is said
    for levels, fields in ((7, {"max_noise_level": 5}), (5, {})):
        low = make_conditioner({"low_res": {"num_levels": levels, **fields}})
        few = conditions.batch_of(low, lambda prompts: None, {"low_res": SMALL}, SIZE, (4, 4))
        np.testing.assert_array_equal(few["noise_level"], [4])  # its highest
        beyond = {"low_res": SMALL, "noise_level": 5}
        with pytest.raises(ValueError, match=r"noise_level: 5 must lie in \[0, 5\)"):
            conditions.batch_of(low, lambda prompts: None, beyond, SIZE, (4, 4))
    two = batch_of(["layout"], layout=[[(3, BOX)], [(4, BOX), (1, BOX)]])
    np.testing.assert_array_equal(two["layout"][:, [0, 3]], [[3, 25], [4, 1]])
    tokens = batch_of(["layout"], layout=two["layout"])["layout"]
    np.testing.assert_array_equal(tokens, two["layout"])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("class_label", {}, "conditioned on class_label: give class_labels"),
        ("masked_image", {"image": IMAGE}, "conditioned on mask: give mask"),
        ("depth", {"depth": np.ones((8, 8, 1)), "layout": []}, "layout given, but .* takes depth"),
        ("class_label", {"class_labels": [6]}, r"class_labels: 6 must lie in \[0, 6\)"),
        ("class_label", {"class_labels": [-1]}, r"class_labels: -1 must lie in \[0, 6\)"),
        ("class_label", {"class_labels": [1.5]}, "class_labels: got float64, expected integers"),
        ("class_label", {"class_labels": []}, r"class_labels has shape \(0,\), expected \[N\]"),
        ("class_label", {"class_labels": [[1, 2]]}, r"class_labels has shape \(1, 2\), expected"),
        (
            "layout",
            {"layout": [(3, (0.1, 0.2, 1.2, 0.9))]},
            r"box \(0.1, 0.2, 1.2, 0.9\) must have",
        ),
        ("layout", {"layout": [(3, (0.5, 0.2, 0.4, 0.9))]}, "must have 0 ≤ left < right ≤ 1"),
        ("layout", {"layout": [(3, 0.5)]}, r"layout: \(3, 0.5\): write \(class, \(left, top"),
        ("layout", {"layout": [(2.7, BOX)]}, r"layout: \(2.7, \(0.1, .*: write \(class, \(left"),
        ("layout", {"layout": [(None, BOX)]}, r"layout: \(None, \(0.1, .*: write \(class, \(left"),
        ("layout", {"layout": [(3, ("a", 0, 1, 1))]}, r"layout: \(3, \('a', .*: write \(class"),
        ("layout", {"layout": [3, 4]}, r"layout: 3: write \(class, \(left"),
        ("layout", {"layout": 3}, r"layout: 3: write \(class, \(left"),
        ("layout", {"layout": []}, r"layout: \[\]: write \(class, \(left"),
        ("layout", {"layout": [(3, BOX)] * 3}, "layout: 3 objects, but this model takes 2 at most"),
        ("layout", {"layout": [(25, BOX)]}, r"class 25 must lie in \[0, 25\)"),
        (
            "layout",
            {"layout": np.zeros((2, 5), int)},
            r"layout has shape \(2, 5\), expected \[N 8\]",
        ),
        (
            "spatial_rescaler",
            {"segmentation": np.full(SIZE, -1)},
            r"segmentation: -1 must lie in \[0, 2147483648\)",
        ),
        (
            "spatial_rescaler",
            {"segmentation": np.zeros((4, 8), int)},
            r"segmentation has shape \(1, 4, 8\), expected \[N 8 8\]",
        ),
        (
            "masked_image",
            {"image": IMAGE, "mask": MASK[:4]},
            r"mask has shape \(1, 4, 8, 1\), expected \[N 8 8 1\]",
        ),
        ("masked_image", {"image": IMAGE, "mask": 2 * MASK}, r"mask: values in \[0, 2\], expected"),
        ("low_res", {"low_res": IMAGE}, r"low_res has shape \(1, 8, 8, 3\), expected \[N 4 4 3\]"),
        (
            "low_res",
            {"low_res": SMALL, "noise_level": 30},
            r"noise_level: 30 must lie in \[0, 30\)",
        ),
        (
            "low_res",
            {"low_res": SMALL, "noise_level": [[3]]},
            r"noise_level has shape \(1, 1\), exp",
        ),
        ("neighbours", {"neighbours": np.ones((2, 5))}, r"expected \[N any 6\]"),
        ("image_embedding", {"image_embedding": np.ones(5)}, r"expected \[N 6\]"),
        ("image_embedding", {"image_embedding": np.full(6, np.nan)}, r"values in \[nan, nan\]"),
    ],
)
def test_a_wrong_condition_is_one_line_that_names_it(name, given, message):
    with pytest.raises(ValueError, match=message):
        batch_of([name], **given)


def test_numbers_of_examples_must_agree():
    with pytest.raises(ValueError, match="2 class_labels for 3 depth"):
        batch_of(["class_label", "depth"], class_labels=[0, 1], depth=np.ones((3, 8, 8, 1)))


def test_the_picture_takes_the_size_of_its_conditions():
    assert conditions.size_of({"segmentation": np.zeros((2, 16, 8))}, 2) == (16, 8)
    assert conditions.size_of({"low_res": np.zeros((4, 6, 3))}, 4) == (16, 24)
    assert conditions.size_of(
        {"image": np.zeros((1, 8, 6, 3)), "mask": np.zeros((1, 8, 6, 1))}, 2
    ) == (8, 6)
    assert conditions.size_of({"class_labels": [1], "image": np.zeros((1, 8, 6, 3))}, 4) is None
    assert set(FIELDS) <= set(CONDITIONERS)


@functools.cache
def model(*names):
    """Pixel space, so that the decoder adds nothing; every parameter is random."""
    identity = make_autoencoder({"regularization": "identity", "image_channels": 3})
    first_stage = init_first_stage(identity, RNG, jnp.zeros((1, *SIZE, 3)))
    conditioner = make_conditioner({name: FIELDS[name] for name in names})
    batch = {"image": IMAGE[None], "mask": MASK[None], "low_res": IMAGE[None]}
    batch |= {"class_label": jnp.zeros(1, jnp.int32)}
    batch = jax.tree.map(jnp.asarray, batch)
    batch = conditioner.prepare(batch, first_stage, SIZE, RNG[None])
    drop = jnp.zeros(1, bool)
    conditioning, own = conditioner.init_with_output(RNG, batch, drop)
    unet = UNet(3, 8, (1,), 1, (1,), num_heads=2, num_groups=4)
    shapes = jax.eval_shape(unet.init, RNG, jnp.zeros((1, *SIZE, 3)), jnp.zeros(1), conditioning)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), shapes["params"])
    params = {"unet": params, "conditioner": own.get("params", {})}
    denoiser = Denoiser(params, make_schedule(), unet, conditioner, "v")
    defaults = {"sampler": "ddim", "num_steps": 2, "guidance_scale": 2.0}
    return Model(first_stage, denoiser, None, defaults, image_size=8)


def test_an_inpainting_model_is_told_the_picture_and_keeps_what_is_not_missing():
    made = model("masked_image", "class_label")
    given = {"class_labels": [1, 3], "image": IMAGE, "mask": MASK, "mode": "single"}
    images = made.sample(RNG, num_images=2, **given)
    assert images.shape == (4, *SIZE, 3)
    np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(IMAGE[:, :4], (4, 8, 4, 3)))
    assert np.abs(images[:, :, 4:] - IMAGE[:, 4:]).max() > 0.1
    # What was in the hole isn't told; what is around it is.
    hidden = made.sample(RNG, num_images=2, **{**given, "image": np.where(MASK > 0, 0.9, IMAGE)})
    np.testing.assert_allclose(hidden[:, :, 4:], images[:, :, 4:], atol=1e-5)
    other = made.sample(RNG, num_images=2, **{**given, "image": -IMAGE})
    assert np.abs(other[:, :, 4:] - images[:, :, 4:]).max() > 0.05
    # condition() says the same as sample() was told.
    told = made.condition(class_labels=[1], image=IMAGE, mask=MASK)
    np.testing.assert_allclose(told.concat[0, ..., :3], np.where(MASK > 0, -1, IMAGE), atol=1e-6)
    np.testing.assert_array_equal(told.concat[0, ..., 3:], 2 * MASK - 1)


GREY = np.float32(IMAGE @ [0.299, 0.587, 0.114])[..., None]


def test_a_grey_first_stage_sees_the_brightness_of_a_picture():
    module = make_autoencoder({"regularization": "identity", "image_channels": 1})
    made = model().replace(first_stage=init_first_stage(module, RNG, jnp.zeros((1, *SIZE, 1))))
    np.testing.assert_allclose(made.encode(IMAGE[None]), GREY[None], atol=1e-6)
    np.testing.assert_array_equal(made.encode(np.repeat(GREY, 3, -1)[None]), GREY[None])
    np.testing.assert_array_equal(conditions.in_channels(IMAGE, 3), IMAGE)
    conditioner = make_conditioner({"masked_image": {}})
    told = {"image": IMAGE, "mask": MASK}
    batch = conditions.batch_of(conditioner, lambda prompts: None, told, SIZE, SIZE, 1)
    np.testing.assert_allclose(batch["image"], GREY[None], atol=1e-6)
    painted = made.replace(denoiser=made.denoiser.replace(conditioner=conditioner))
    concat = painted.condition(**told).concat
    np.testing.assert_allclose(concat[0, ..., :1], np.where(MASK > 0, -1, GREY), atol=1e-6)
    known = conditions.known_image(IMAGE, MASK, False, (*SIZE, 1), 2)["known"]
    np.testing.assert_allclose(known, np.stack([GREY] * 2), atol=1e-6)
    white = conditions.known_image(IMAGE > -2, MASK, False, (*SIZE, 1), 2)["known"]
    np.testing.assert_array_equal(white, np.ones_like(known))
    with pytest.raises(ValueError, match=r"image: values in \[.*\], expected \[-1, 1\]"):
        conditions.known_image(9 * IMAGE, MASK, False, (*SIZE, 1), 2)


def test_a_noised_condition_belongs_to_its_image_whatever_the_batch():
    made = model("low_res")
    given = {"low_res": IMAGE, "noise_level": 25, "batch_size": 2, "mode": "single"}
    images = made.sample(RNG, num_images=4, **given)
    np.testing.assert_allclose(made.sample(RNG, num_images=3, **given), images[:3], atol=1e-4)
    # Images 0 and 2 are first in their batches, but have noise of their own.
    assert np.abs(images[0] - images[2]).max() > 0.05
    with pytest.raises(ValueError, match="low_res: noise needs a key for each example"):
        made.condition(low_res=IMAGE)
    levels = [
        made.condition(low_res=IMAGE, noise_level=n, rng=RNG).concat[0] - IMAGE for n in (0, 29)
    ]
    assert np.std(levels[1]) > 3 * np.std(levels[0]) > 0


def test_a_picture_to_resemble_pulls_samples_and_bad_guides_are_named():
    made = model("class_label")
    given = {"class_labels": [1], "num_images": 4, "mode": "single"}
    target = IMAGE.reshape(4, 2, 4, 2, 3).mean((1, 3))

    def distance(wanted):
        images = made.sample(RNG, **given, target=wanted, target_scale=3.0, clip_x0=1.0)
        reduced = jax.image.resize(images, (4, 4, 4, 3), "cubic")
        return float(jnp.mean(jnp.square(reduced - target)))

    assert distance(target) < 0.8 * distance(np.zeros_like(target))
    for wrong, message in (
        ({"classifier_labels": [1]}, "give classifier and classifier_labels"),
        ({"target": np.zeros((2, 4, 4, 3))}, "2 of target for 4 images"),
        ({"target": np.zeros((4, 4, 1))}, r"target has shape \(4, 4, 1\), expected \[N h w 3\]"),
        (
            {"target": np.uint8(target)},
            r"target: dtype uint8, expected floats in \[-1, 1\]: x / 127",
        ),
        ({"target": 127.5 * target + 127.5}, r"target: values up to 2\d\d.*, expected \[-1, 1\]"),
        ({"target": target, "target_distance": "l3"}, "unknown target_distance 'l3'; known: l2"),
    ):
        with pytest.raises(ValueError, match=message):
            made.sample(RNG, **given, **wrong)


def test_a_classifier_must_know_the_noise_the_latents_and_the_labels():
    made, net = model("class_label"), UNet(3, 8, (1,), 1, (1,), num_heads=2, num_groups=4)

    def sample(schedule, label, channels=3):
        params = {"input_blocks_0_0": {"kernel": np.zeros((3, 3, channels, 8))}}
        guide = NoisyClassifier(params, schedule, net)
        made.sample(RNG, class_labels=[1], classifier=guide, classifier_labels=[label])

    for other in (make_schedule("cosine"), make_schedule(num_timesteps=10)):
        with pytest.raises(ValueError, match="classifier was trained with another noise schedule"):
            sample(other, 0)
    with pytest.raises(ValueError, match="latents with 4 channels, this model's have 3"):
        sample(make_schedule(), 0, channels=4)
    for label in (-1, 3, 2**40):
        with pytest.raises(ValueError, match=rf"classifier_labels: {label} must lie in \[0, 3\)"):
            sample(make_schedule(), label)
    with pytest.raises(ValueError, match="classifier_labels: got float64, expected integers"):
        sample(make_schedule(), 1.7)


@pytest.mark.parametrize("tokenizer", [None, WordTokenizer.train(["red"], 4, 3)])
def test_texts_are_for_models_that_read_prompts(tokenizer):
    """A tokenizer alone, as a run may have, makes no text of a class."""
    made = model("class_label").replace(tokenizer=tokenizer)
    for name, value in (("negative_prompts", "red"), ("more_prompts", [("red", 0.5)])):
        with pytest.raises(ValueError, match=f"^{name} given, but this model reads no prompts$"):
            made.sample(RNG, class_labels=[1], mode="single", **{name: value})


def test_scales_of_guidance_for_which_a_model_was_not_distilled_are_warned_of(caplog):
    for scale, wrong in ((2.0, ""), (3.0, ""), (None, ""), (4.0, "4"), (0.5, "0.5"), ((2, 5), "5")):
        caplog.clear()
        guides.warn_of_scale({"guidance_range": (1.0, 3.0)}, SamplingOptions(guidance_scale=scale))
        said = [f"guidance_scale={wrong}, but the model is distilled for 1 to 3"] if wrong else []
        assert caplog.messages == said
    guides.warn_of_scale({}, SamplingOptions(guidance_scale=100.0))
    assert caplog.messages == said


def test_a_tile_as_large_as_the_shorter_trained_side_is_no_fault(caplog):
    made = model("class_label").replace(image_size=(8, 16))
    for tile, warnings in ((8, 0), (4, 1)):
        with pytest.raises(ValueError, match="parallel mode"):  # before anything is compiled
            made.sample(RNG, class_labels=[1], tile_size=tile, mode="none")
        assert len(caplog.messages) == warnings


def test_sides_of_pictures_are_bounded():
    for size in ((2**16 + 1, 8), (8, 0), (-8, 8)):
        with pytest.raises(ValueError, match="sides lie in 1 … 65536 pixels"):
            model("class_label").sample(RNG, class_labels=[1], image_size=size, mode="none")


def test_bounds_of_conditions():
    with pytest.raises(ValueError, match=r"image has shape \(1, 4, 4, 3\), expected \[N 8 8 3\]"):
        batch_of(["masked_image"], image=SMALL, mask=MASK)
    with pytest.raises(ValueError, match=r"box .0.5, 0.0, 0.5, 1.0. must have"):
        batch_of(["layout"], layout=[(3, (0.5, 0, 0.5, 1))])
    sizes = make_conditioner({"sizes": {}})
    for name, least in (("original_size", 1), ("target_size", 1), ("crop_top_left", 0)):
        for value in (least, least - 1):
            given = {name: (value, 9)}
            if value == least:
                batch = conditions.batch_of(sizes, list, given, SIZE, SIZE)
                np.testing.assert_array_equal(batch[name], [[least, 9]])
                continue
            with pytest.raises(ValueError, match=f"{name}: {value} pixels, expected at least"):
                conditions.batch_of(sizes, list, given, SIZE, SIZE)
    assert conditions.in_range(np.full((1, 2, 2, 3), 1.9, np.float32)).max() > 1.8  # a decoder's
    tokens = make_conditioner({"class_token": {"num_classes": 3}})  # without a null class
    given = ({"class_labels": 2}, SIZE, SIZE)
    np.testing.assert_array_equal(conditions.batch_of(tokens, list, *given)["class_label"], [2])
    with pytest.raises(ValueError, match=r"class_labels: 3 must lie in \[0, 3\)"):
        conditions.batch_of(tokens, list, {"class_labels": 3}, SIZE, SIZE)
    unlabelled = np.full((1, *SIZE), 255)  # which trains as no class
    batch = batch_of(["spatial_rescaler"], segmentation=unlabelled)
    np.testing.assert_array_equal(batch["segmentation"], unlabelled)
    squares = make_conditioner({"segmentation_tokens": {"num_classes": 4, "factor": 2}})
    with pytest.raises(ValueError, match=r"segmentation: 2×2 .* as 255; .* numbers below 4"):
        conditions.batch_of(squares, list, {"segmentation": unlabelled}, SIZE, SIZE)
    at_the_edge = np.pad(np.ones((4, 4), int), (0, 1), constant_values=255)  # isn't read
    assert squares.parts()[0].unread_square(at_the_edge) is None
    unlabelled[:, ::2, ::2] = 3  # one pixel of each square
    batch = conditions.batch_of(squares, list, {"segmentation": unlabelled}, SIZE, SIZE)
    np.testing.assert_array_equal(batch["segmentation"], unlabelled)
    for reach in (2.5, np.nan):
        with pytest.raises(ValueError, match=r"values up to .*, expected \[-1, 1\]"):
            conditions.in_range(np.full((1, 2, 2, 3), reach, np.float32))


def test_conditions_from_files(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(labels)
    palette.putpalette([7 * i % 256 for i in range(768)])  # colours don't matter, indices do
    for name, picture in (("grey.png", Image.fromarray(labels)), ("palette.png", palette)):
        picture.save(tmp_path / name)
        read = sampling.read_map(str(tmp_path / name), "levels")
        np.testing.assert_array_equal(read, labels[None])
    depth = sampling.read_map(str(tmp_path / "grey.png"), "depth")
    np.testing.assert_array_equal(depth[0, ..., 0], labels)
    (tmp_path / "layout.json").write_bytes("\ufeff[[3, [0.1, 0.2, 0.6, 0.9]]]".encode())
    layout = sampling.read_json(str(tmp_path / "layout.json"))
    np.testing.assert_array_equal(
        batch_of(["layout"], layout=layout)["layout"],
        batch_of(["layout"], layout=[(3, BOX)])["layout"],
    )
    np.save(tmp_path / "embedding.npy", np.ones(6))
    assert sampling.read_array(str(tmp_path / "embedding.npy")).shape == (6,)
    assert sampling.read_map(None, "mask") is sampling.read_json(None) is sampling.read_array(None)
    picture = np.zeros((3, 4, 4), np.uint8)  # transparent
    Image.fromarray(picture).save(tmp_path / "picture.png")
    assert (sampling.read_picture(str(tmp_path / "picture.png")) == 1).all()
    (tmp_path / "prompts.txt").write_bytes("\ufeffa \u2028 b\r\n\nc\n".encode())
    prompts = sampling.read_prompts(None, str(tmp_path / "prompts.txt"))
    assert prompts == ["a \u2028 b", "", "c"]
    (tmp_path / "bad").write_text("no")
    for read in (sampling.read_json, sampling.read_array):
        with pytest.raises(ValueError, match=r"bad: (not JSON|no NumPy array)"):
            read(str(tmp_path / "bad"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json: not JSON: maximum recursion depth"):
        sampling.read_json(str(tmp_path / "deep.json"))
    (tmp_path / "empty").touch()
    np.savez(tmp_path / "several.npz", np.ones(6))
    for name in ("empty", "several.npz"):
        with pytest.raises(ValueError, match=f"{name}: no NumPy array"):
            sampling.read_array(str(tmp_path / name))


class Recorder:
    """A model that records the options of a call."""

    trained_size, downsampling = (8, 8), 2

    def __init__(self, *keys):
        self.conditioner = SimpleNamespace(keys=keys)

    def sample(self, rng, prompts, class_labels, **options):
        self.options = options
        return np.zeros((1, 8, 8, 3), np.float32)


@pytest.mark.parametrize("name", ["original_size", "crop_top_left", "target_size"])
def test_sizes_of_another_length_are_refused(name):
    conditioner = make_conditioner({"sizes": {}})
    for value, shape in (([9], "1, 1"), ((1, 2, 3), "1, 3"), (np.ones((2, 2, 2), int), "2, 2, 2")):
        with pytest.raises(ValueError, match=rf"{name} has shape \({shape}\), expected \[N 2\]"):
            conditions.batch_of(conditioner, list, {name: value}, (8, 8), (1, 1))


def test_a_refiner_is_loaded_from_its_path(tmp_path, monkeypatch):
    model = Recorder()
    options = given_to(model, tmp_path, monkeypatch, refiner=sampling.read_refiner("C:/there:0.25"))
    assert options["refiner"] == (model, 0.25)
    with pytest.raises(ValueError, match="--refiner=there: write PATH:SHARE"):
        sampling.read_refiner("there")


class Painter(Recorder):
    """A model whose images are all different, and which is 8 pixels high and 6 wide."""

    trained_size = (8, 6)

    def sample(self, rng, prompts, class_labels, num_images, **options):
        self.options = options
        count = num_images * len(prompts or class_labels or [""])
        count *= len(options.get("image_embedding", [0]))
        levels = np.linspace(-1, 1, count, dtype=np.float32)[:, None, None, None]
        return np.tile(levels, (1, *self.trained_size, 3))


def test_the_files_of_a_call_are_prompt_major(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "load", lambda *_, **__: Painter())
    prompts = sampling.read_prompts("a; b ;c", None)
    images = sampling.sample_to_disk("here", tmp_path, prompts=prompts, num_images=2)
    assert (tmp_path / "prompts.txt").read_text().splitlines() == ["a", "a", "b", "b", "c", "c"]
    files = [np.asarray(Image.open(tmp_path / f"{i:05d}.png")) for i in range(6)]
    for written in (files, np.load(tmp_path / "samples.npz")["arr_0"]):
        np.testing.assert_array_equal(written, images)
    grid = Image.open(tmp_path / "grid.png")  # a row for each prompt
    np.testing.assert_array_equal(grid, image_grid(images, 2))
    (tmp_path / "00006.png").touch()  # of somebody else
    sampling.sample_to_disk("here", tmp_path, class_labels=[4, 7], num_images=1)
    assert (tmp_path / "prompts.txt").read_text().splitlines() == ["4", "7"]
    left = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert left == ["00000.png", "00001.png", "00006.png"]


def test_a_line_of_the_prompts_is_of_one_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "load", lambda *_, **__: Painter())
    given = {"prompts": ["a\nb"], "image_embedding": np.ones((3, 6)), "num_images": 2}
    sampling.sample_to_disk("here", tmp_path, **given)
    assert (tmp_path / "prompts.txt").read_text().splitlines() == ["a b"] * 6
    with pytest.raises(ValueError, match=r"^'caf\\udce9' has bytes that aren't UTF-8$"):
        sampling.read_prompts("caf\udce9", None)


def test_pictures_of_one_channel_are_grey(tmp_path, monkeypatch):
    class Grey(Painter):
        def sample(self, *given, **options):
            return super().sample(*given, **options)[..., :1]

    monkeypatch.setattr(sampling, "load", lambda *_, **__: Grey())
    images = sampling.sample_to_disk("here", tmp_path, num_images=2)
    written = Image.open(tmp_path / "00001.png")
    assert written.mode == "L"
    np.testing.assert_array_equal(written, images[1, ..., 0])


def test_a_folder_that_takes_no_pictures_is_named_before_the_sampling(tmp_path, monkeypatch):
    painter, file = Painter(), tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sampling, "load", lambda *_, **__: painter)
    for out in (file, Path("/proc/self")):
        with pytest.raises(OSError, match=str(out)):
            sampling.sample_to_disk("here", out)
    assert not hasattr(painter, "options")


def test_a_side_that_is_not_given_is_that_of_the_hints_or_of_training(tmp_path, monkeypatch):
    options_of = functools.partial(given_to, tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert options_of(Painter(), height=4)["image_size"] == (4, 6)
    assert options_of(Painter(), width=4)["image_size"] == (8, 4)
    Image.new("RGB", (10, 12), "white").save(tmp_path / "hint.png")
    net = ControlWeights(path="net", params={}, fields={})
    monkeypatch.setattr(sampling, "load_adapter", lambda path: net)
    hint = ("net", str(tmp_path / "hint.png"), 0.5)
    options = options_of(Painter(), width=4, controls=[hint])
    assert options["image_size"] == (12, 4)
    ((got, picture, weight),) = options["controls"]
    assert got is net and weight == 0.5
    np.testing.assert_array_equal(picture, np.ones((1, 12, 10, 3)))


def test_the_refiner_is_loaded_as_the_model_is(tmp_path, monkeypatch):
    loaded = {}
    monkeypatch.setattr(sampling, "load", lambda path, **how: loaded.setdefault(path, how) and None)
    how = {"tokenizer": "words", "dtype": "bfloat16", "scan": True}
    with pytest.raises(AttributeError):  # there is no model to sample from
        sampling.sample_to_disk("here", tmp_path, refiner=("there", 0.25), lora={"x": 1.0}, **how)
    assert loaded == {"here": {**how, "lora": {"x": 1.0}}, "there": how}


def test_an_image_encoder_needs_a_picture_that_it_encodes(tmp_path):
    with pytest.raises(ValueError, match="--image_encoder is that of --image_prompt: give"):
        sampling.sample_to_disk("here", tmp_path, image_encoder="vit")


def test_flags_of_several_texts():
    assert sampling.read_weighted("at 10:30:0.5; b:-1") == [("at 10:30", 0.5), ("b", -1.0)]
    bar = sampling.ProgressBar()
    bar.total = 5
    bar(0)
    assert bar.total == 5
    bar._bar.close()


def given_to(model, tmp_path, monkeypatch, **options):
    monkeypatch.setattr(sampling, "load", lambda *_, **__: model)
    sampling.sample_to_disk("here", tmp_path, num_images=1, **options)
    return model.options


def test_a_picture_to_start_from_is_cut_and_resized(tmp_path, monkeypatch, capsys):
    """Its middle, in the shape of the result; a mask goes with it, and stays of zeros and ones."""
    columns = np.linspace(-1, 1, 24, dtype=np.float32)
    image = np.broadcast_to(columns[None, :, None], (16, 24, 3))[None]
    mask = (image[..., :1] > 0).astype(np.float32)
    options_of = functools.partial(given_to, tmp_path=tmp_path, monkeypatch=monkeypatch)
    options = options_of(Recorder(), image=image, strength=0.5)
    assert "--image has 24×16 pixels: its middle is resized to 8×8" in capsys.readouterr().out
    expected = columns[4:20].reshape(8, 2).mean(1)  # the middle 16 columns, two by two
    np.testing.assert_allclose(options["image"][0, 4, 1:-1, 0], expected[1:-1], atol=0.02)
    assert options["image"].shape == (1, 8, 8, 3) and "image_size" not in options
    options = options_of(Recorder("image", "mask"), image=image, mask=mask, height=4, width=6)
    assert options["image_size"] == (4, 6) and options["image"].shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(options["mask"][0, ..., 0], [[0, 0, 0, 1, 1, 1]] * 4)
    assert options_of(Recorder(), width=16)["image_size"] == (8, 16)
    same = to_float(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))[None]
    capsys.readouterr()
    np.testing.assert_array_equal(options_of(Recorder(), image=same, strength=0.5)["image"], same)
    assert "resized" not in capsys.readouterr().out
    # A map or a small picture determines the result's size, and so the picture's.
    enlarging = Recorder("low_res")
    for name, x in (("low_res", np.zeros((1, 3, 5, 3))), ("segmentation", np.zeros((1, 6, 10)))):
        options = options_of(enlarging, image=image, strength=0.5, **{name: x})
        assert options["image"].shape == (1, 6, 10, 3)
    assert options_of(enlarging, low_res=np.zeros((1, 3, 5, 3)), width=4)["image_size"] == (6, 4)
    assert options_of(Recorder("image"), image=image)["image"] is image  # a condition of any size
    start = options_of(Recorder("image"), image=image, strength=0.5)["image"]
    assert start.shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="mask has 12×16 pixels, but image has 24×16"):
        options_of(Recorder(), image=image, mask=mask[:, :, :12])


@pytest.mark.parametrize("encode_crop", [True, False])
@pytest.mark.parametrize("name", ["layout", "layout_tokens"])
def test_objects_of_a_run_with_centres_have_two_tokens(name, encode_crop):
    config = make_config("denoising", **{"data.layout.centres": True})
    config.data.layout.encode_crop = encode_crop
    config.conditioners = ConfigDict({name: {"vocab_size": 26, "max_length": 8}})
    conditioner = make_conditioner(conditioner_fields(config))
    given = {"layout": [(3, BOX)]}
    got = conditions.batch_of(conditioner, lambda prompts: None, given, SIZE, SIZE)
    want = LayoutTokens(26, 3 if encode_crop else 4, encode_crop, True).build([Object(3, BOX)])
    np.testing.assert_array_equal(got["layout"], want[None])
    with pytest.raises(ValueError, match="two corners for an object, this model has its centre"):
        of_corners(conditioner_fields(config)[name])
    assert of_corners({"width": 4, "centres": False, "encode_crop": None}) == {"width": 4}


@pytest.mark.parametrize("name", ["word_map", "layout_map"])
def test_learned_maps_say_which_fields_another_size_needs(name):
    fields = {"word_map": {"vocab_size": 16}, "layout_map": {"vocab_size": 26, "max_length": 8}}
    conditioner = make_conditioner({name: {**fields[name], "height": 4, "width": 4}})
    batch = {"tokens": np.zeros((1, 3), np.int32), "layout": np.zeros((1, 8), np.int32)}
    assert conditioner.prepare(batch, None, (4, 4)) == batch
    message = f"{name} has maps of 4×4, but the latent is 4×8: .* conditioners.{name}.width=8"
    with pytest.raises(ValueError, match=message):
        conditioner.prepare(batch, None, (4, 8))


def test_a_mask_without_a_picture_is_named_before_a_model_is_read(tmp_path):
    with pytest.raises(ValueError, match="made anew: give --image, too"):
        sampling.sample_to_disk("nowhere", tmp_path, mask=np.zeros((1, 8, 8, 1), np.float32))
