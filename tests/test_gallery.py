"""The sheet of a task: what was told, then samples, then what was there."""

import numpy as np
import pytest

from demo import gallery
from demo.gallery import SIDE, coloured, sheet, text


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


def test_an_empty_gallery_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no workdirs; train one"):
        gallery.draw(tmp_path, 1, 1, 0)
