import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import default
from latent_diffusion import data
from latent_diffusion.data import epoch, make_source, make_transform


class TinyColours(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        f = tfds.features
        features = {
            "image": f.Image(shape=(None, None, 3), encoding_format="png"),
            "grey": f.Image(shape=(4, 4, 1), encoding_format="png"),
            "sprite": f.Image(shape=(4, 4, 4), encoding_format="png"),
            "label": f.ClassLabel(names=["dark", "bright"]),
            "text": f.Text(),
            "texts": f.Sequence(f.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "image": Image.new("RGB", (4 + i, 4), (i * 40,) * 3),
                    "grey": Image.new("L", (4, 4), i * 40),
                    "sprite": Image.new("RGBA", (4, 4), (0, 0, 0, 0)),
                    "label": i % 2,
                    "text": f"number {i}",
                    "texts": [f"number {i}", f"the {i}"],
                },
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyColours(data_dir=str(path), file_format="array_record").download_and_prepare()
    return path


def config(folder, **changes):
    c = default.data()
    c.update({"name": "tfds:tiny_colours", "dir": str(folder), "image_size": 4, "crop": "center"})
    c.update({"test_split": "validation", **changes})
    return c


def test_usual_features_are_found(folder):
    source = make_source(config(folder), "train")
    assert len(source) == 6 and len(make_source(config(folder), "test")) == 2
    assert source.class_names == ("dark", "bright")
    for i in range(6):
        example = source[i]
        number = int(example["caption"].removeprefix("number "))
        assert set(example) == {"image", "class_label", "caption"}
        assert example["class_label"] == number % 2 and example["image"].shape == (4, 4 + number, 3)
    assert sorted(data.captions(source)) == [f"number {i}" for i in range(6)]
    (batch,) = epoch(source, make_transform(config(folder), train=False), 6)
    assert batch["image"].shape == (6, 4, 4, 3) and batch["class_label"].dtype == np.int32


def test_configured_features(folder):
    features = {"image": "grey", "caption": "texts"}
    source = make_source(config(folder, features=features, train_split="train[:50%]"), "train")
    assert len(source) == 3 and set(source[0]) == {"image", "caption"}
    assert source[0]["image"].shape == (4, 4, 3)
    number = source[0]["caption"][0].removeprefix("number ")
    assert source[0]["caption"] == [f"number {number}", f"the {number}"]
    assert len(data.captions(source)) == 6
    sprites = make_source(config(folder, features={"image": "sprite"}), "train")
    assert (sprites[0]["image"] == np.full((4, 4, 3), 255)).all()
    titled = make_source(config(folder, features={"caption": "text"}), "train")[0]
    assert set(titled) == {"image", "caption"} and titled["image"].shape[1] > 3
    moments = make_source(config(folder, features={"moments": "grey"}), "train")
    assert set(moments[0]) == {"moments"}
    with pytest.raises(ValueError, match="no caption; mapped: image"):
        data.captions(make_source(config(folder, features={"image": "grey"}), "train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": {"image": "photo"}},
            "data.features.image: .* no feature 'photo'; known: grey",
        ),
        ({"train_split": "dev"}, "unknown split 'dev' of tiny_colours; known: train, validation"),
        ({"name": "tfds:"}, "needs the data set's name"),
        ({"name": "tfds:no_such_set"}, "no data set 'no_such_set'"),
    ],
)
def test_errors_are_one_line(folder, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        make_source(config(folder, **changes), "train")
    assert "\n" not in str(error.value)


def test_an_unprepared_set_says_how(tmp_path):
    with pytest.raises(ValueError, match=r"not prepared in .*file_format='array_record'") as error:
        make_source(config(tmp_path), "train")
    assert "\n" not in str(error.value)


def test_other_file_formats_have_no_random_access(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="stored as tfrecord, which has no random access"):
        make_source(config(tmp_path), "train")


@pytest.mark.parametrize("features", [{}, {"caption": "text"}])
def test_without_an_image_feature(folder, features, monkeypatch):
    monkeypatch.setattr("latent_diffusion.data.tfds.USUAL_FEATURES", {"image": ("photo",)})
    with pytest.raises(ValueError, match="name the image feature of 'tiny_colours'; known: grey"):
        make_source(config(folder, features=features), "train")
