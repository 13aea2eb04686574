"""Small classes in training."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image
from tiny import make_config

from configs import default
from latent_diffusion import data
from latent_diffusion.data import image_folder
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.training import start as starting

LABELS = [0] * 36 + [1] * 4 + [2] * 9


def source(labels=LABELS):
    return data.ArraySource({"number": list(range(len(labels))), "class_label": labels})


@pytest.mark.parametrize(
    ("balance", "counts"), [(0.0, (36, 4, 9)), (0.5, (36, 12, 18)), (1.0, (36, 36, 36))]
)
def test_shares_of_the_classes(balance, counts):
    balanced = data.Balanced(source(), balance)
    seen = [balanced[i] for i in range(len(balanced))]
    assert tuple(collections.Counter(e["class_label"] for e in seen)[c] for c in range(3)) == counts
    times = collections.Counter(e["number"] for e in seen)
    for label in range(3):  # the examples of a class share its places
        of_class = [times[i] for i in range(len(LABELS)) if LABELS[i] == label]
        assert max(of_class) - min(of_class) <= 1 and min(of_class) >= 1


def test_data_without_classes_stays_as_it_is(caplog):
    plain = data.Balanced(data.ArraySource({"number": [1, 2, 3]}), 0.5)
    assert [plain[i]["number"] for i in range(len(plain))] == [1, 2, 3]
    assert "data.balance=0.5 changes nothing: the data have no classes" in caplog.text


def test_the_classes_of_a_folder_are_known_without_its_pictures(tmp_path, monkeypatch):
    for name in ("a/1", "a/2", "b/3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    opened, read = [], image_folder.read_image
    monkeypatch.setattr(image_folder, "read_image", lambda path: opened.append(path) or read(path))
    fields = default.data()
    fields.update({"name": "image_folder", "dir": str(tmp_path), "train_split": "all"})
    balanced = data.Balanced(data.make_source(fields, "train"), 1.0)
    assert len(opened) <= 1
    assert sorted(balanced[i]["name"] for i in range(4)) == ["1.png", "2.png", "3.png", "3.png"]


def test_a_bad_balance_is_one_line():
    with pytest.raises(ValueError, match=r"data.balance=1.5, expected a number in \[0, 1\]"):
        data.Balanced(source(), 1.5)


def test_training_draws_small_classes_more_often(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (len(LABELS), 16, 16, 3), np.uint8))
    pictures = data.ArraySource({"image": images, "class_label": LABELS})
    monkeypatch.setattr(data, "make_source", lambda *_: pictures)
    config = make_config("autoencoding", **{"data.balance": 1.0, "batch_size": 4})
    config.parallel.mode = "single"
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        run = starting.start(config, tmp_path, checkpoints)
    labels = [k for b in itertools.islice(run.batches, 27) for k in b["class_label"].tolist()]
    assert collections.Counter(labels) == {0: 36, 1: 36, 2: 36}  # one epoch
