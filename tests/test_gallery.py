"""The sheet of a task: what was told, then samples, then what was there."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import default
from demo import gallery
from demo.gallery import SIDE, coloured, sheet, text
from latent_diffusion import data


def grey(level, size=4):
    return np.full((size, size, 3), level, np.uint8)


def test_a_row_is_condition_samples_truth():
    rows = [(grey(10 * r), np.stack([grey(10 * r + i) for i in (1, 2)]), grey(99)) for r in (1, 2)]
    picture = np.asarray(sheet(rows))
    middles = [int(picture[16 + SIDE // 2, x, 0]) for x in _centres(picture)]
    assert middles == [10, 11, 12, 99]
    second = picture[16 + SIDE + 2 + SIDE // 2]
    assert [int(second[x, 0]) for x in _centres(picture)] == [20, 21, 22, 99]


def _centres(picture):
    half, gap = SIDE // 2, 8
    starts = (0, SIDE + gap, 2 * SIDE + gap, 3 * SIDE + 2 * gap)
    assert picture.shape[1] == starts[-1] + SIDE
    return [start + half for start in starts]


def test_conditions_have_pictures():
    words = text("woman firefighter, medium-dark skin tone")
    assert words.shape == (SIDE, SIDE, 3) and words.min() < 64 and (words[:, -2:] == 255).all()
    labels = np.array([[0, 1], [2, 1]])
    colours = coloured(labels)
    assert (colours[0, 0] == 255).all() and (colours[0, 1] == colours[1, 1]).all()
    assert (colours[1, 0] != colours[0, 1]).any()


def test_samples_of_the_right_class_are_recognised_and_those_of_another_are_not(monkeypatch):
    config = SimpleNamespace(data=default.data())
    config.data.update({"name": "synthetic", "image_size": 32})
    source = data.make_source(config.data, "train")
    pictures = {
        example["class_label"]: example["image"] for example in map(source.__getitem__, range(24))
    }

    def accuracies(shift):
        def sample(key, batch_size, class_labels):  # one picture of each label
            assert len(class_labels) == 4 * batch_size
            drawn = np.stack([pictures[(label + shift) % 4] for label in class_labels])
            return drawn / np.float32(127.5) - 1

        monkeypatch.setattr(gallery, "load", lambda _: SimpleNamespace(sample=sample))
        return gallery.class_accuracies("a run", per_class=2, seed=0)

    monkeypatch.setattr(gallery.workdir, "load_config", lambda _: config)
    right, held_out = accuracies(0)
    assert right == 1 and 0.5 < held_out < 1
    assert accuracies(1) == (0, held_out)


def test_an_empty_gallery_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no workdirs; train one"):
        gallery.draw(tmp_path, 1, 1, 0)
