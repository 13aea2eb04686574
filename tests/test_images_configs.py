"""The experiments for anybody's folder of pictures: both stages on one that is made here."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageDraw
from tiny import make_config

import latent_diffusion as ldm
from configs import images_autoencoder, images_class, images_text, images_unconditional
from latent_diffusion.data import ArraySource, make_source
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import loop, start
from latent_diffusion.training.batch_spec import check_classes

VARIANTS = ("64", "128", "256", "smoke")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 pictures that aren't squares, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(60):
        colour, left = ("red", "green", "blue")[i % 3], 4 + i % 10
        picture = Image.new("RGB", (32, 24), "white")
        ImageDraw.Draw(picture).ellipse([left, 4, left + 12, 16], fill=colour)
        picture.save(folder / f"{i}.png")
        lines.append(f"{i}.png\t{colour} ball")
    (folder / "captions.txt").write_text("\n".join(lines))
    return folder


def run(config, pictures, workdir):
    config.data.dir = str(pictures)
    config.parallel.mode = "single"
    config.num_steps = 2
    config.log.images_every_steps = 0
    loop.train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def test_both_stages_train_on_a_folder_and_draw_its_captions(pictures, tmp_path):
    first_stage = tmp_path / "first_stage"
    run(images_autoencoder.get_config("smoke"), pictures, first_stage)
    config = images_text.get_config("smoke")
    config.first_stage.path = str(first_stage)
    run(config, pictures, tmp_path / "text")
    model = ldm.load(tmp_path / "text")
    assert model.tokenizer.unknown_words("a red ball") == ["a"]


def test_a_missing_first_stage_is_to_be_trained_on_the_same_folder(tmp_path):
    config = images_text.get_config("smoke")
    config.data.dir, config.first_stage.path = "mine", str(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone is not usable: ") as raised:
        start.resolve(config, tmp_path)
    command = f"--config=configs/images_autoencoder.py:smoke --workdir={tmp_path / 'gone'}"
    assert str(raised.value).endswith(f"train.py {command} --config.data.dir=mine")


def test_more_classes_than_the_model_has_are_refused(tmp_path):
    for i in range(4):
        (tmp_path / f"class {i}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"class {i}" / "a.png")
    config = images_class.get_config("smoke")
    config.data.update({"dir": str(tmp_path), "train_split": "all", "test_split": "all"})
    section = config.conditioners.class_label
    section.num_classes = 3
    source = make_source(config.data, "train")
    with pytest.raises(
        ValueError, match=r"4 classes, and conditioners\.class_label\.num_classes=3"
    ):
        check_classes(config, source)
    section.num_classes = 4
    check_classes(config, source)
    lines = [{"file_name": f"class {i}/a.png", "class_label": 2 * i} for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="the data have 7 classes"):
        check_classes(config, make_source(config.data, "train"))


@pytest.mark.parametrize("task", ["denoising", "classifying", "prior"])
def test_a_class_beyond_those_of_the_model_is_refused_where_it_is_read(task):
    """Tars, Parquet files and shards don't say how many classes they have."""
    config = make_config(task, **{"first_stage.cache": False})
    if task == "denoising":
        class_label = {"num_classes": 3, "width": 8}
        config.conditioners = ConfigDict({"class_label": class_label})
    if task == "prior":
        config.conditioners = ConfigDict({"class_token": {"num_classes": 3}})
    count = config.classifier.num_classes if task == "classifying" else 3
    picture = np.zeros((8, 8, 3), np.uint8)
    source = ArraySource({"image": [picture] * 3, "class_label": [count - 1, count, -1]})
    transform = start._transform(config, None)
    rng = np.random.default_rng(0)
    assert transform(source[0], rng)["class_label"] == count - 1
    with pytest.raises(ValueError, match=rf"class_label={count} of .*\.num_classes={count}: give"):
        transform(source[1], rng)
    with pytest.raises(ValueError, match=r"class_label=-1 of .*: classes are numbers from 0"):
        transform(source[2], rng)
    with pytest.raises(ValueError, match=r"no class_label, which the model reads; .*: image$"):
        transform({"image": picture}, rng)


@pytest.mark.parametrize("name", ["segmentation_tokens", "spatial_rescaler"])
def test_squares_without_a_class_are_refused_where_they_would_be_class_0(name):
    config = make_config("prior", **{"first_stage.cache": False})
    fields = {"factor": 2} if name == "segmentation_tokens" else {}
    config.conditioners = ConfigDict({name: {"num_classes": 4, **fields}})
    size = config.data.image_size
    labels = np.ones((3, size, size), np.int32)
    labels[0, 2:4, 4:6] = [[255, 255], [255, 3]]  # a square of one class
    labels[1, 2:4, 4:6] = 255
    labels[2, 2:4, 4:6] = [[255, 4], [-1, 255]]
    pictures = [np.zeros((size, size, 3), np.uint8)] * 3
    source = ArraySource({"image": pictures, "segmentation": list(labels)})
    transform, rng = start._transform(config, None), np.random.default_rng(0)
    assert transform(source[0], rng)["segmentation"].max() == 255
    for number in (1, 2):
        if name == "spatial_rescaler":
            np.testing.assert_array_equal(
                transform(source[number], rng)["segmentation"], labels[number]
            )
            continue
        message = r"^segmentation of an example: 2×2 .* labels as 255; \S+_tokens\.num_classes=4$"
        with pytest.raises(ValueError, match=message):
            transform(source[number], rng)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_denoiser_is_that_of_its_autoencoder(variant):
    first_stage = images_autoencoder.get_config(variant)
    assert first_stage.autoencoding.adversarial_start < first_stage.num_steps
    for module in (images_text, images_class, images_unconditional):
        config = module.get_config(variant)
        assert config.autoencoder.to_dict() == first_stage.autoencoder.to_dict()
        assert config.data.to_dict() == first_stage.data.to_dict()
        assert config.data.image_size == (32 if variant == "smoke" else int(variant))
        TASKS[config.task](config)
    with pytest.raises(ValueError, match="unknown variant '65'; known: 128, 256, 64, smoke"):
        images_text.get_config("65")
