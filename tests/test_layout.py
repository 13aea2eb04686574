"""Sentences for boxes: the released models' numbers, there and back, crops and mirrors."""

import numpy as np
import pytest

from latent_diffusion.data.layout import (
    LayoutTokens,
    Object,
    as_objects,
    attribute_label,
    inside,
    mirrored,
    plot,
)

PAPER = LayoutTokens()
OBJECTS = [Object(7, (0.1, 0.2, 0.5, 0.6)), Object(0, (0.0, 0.0, 1.0, 1.0))]


def test_the_grid_of_the_released_models():
    corners = [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [PAPER.place(x, y) for x, y in corners] == [0, 89, 8010, 8099]
    assert (PAPER.none, PAPER.length) == (8191, 92)
    assert [PAPER.point(token) for token in (0, 89, 8010, 8099)] == corners
    assert LayoutTokens(encode_crop=False).length == 90


@pytest.mark.parametrize("centres", [False, True])
@pytest.mark.parametrize("vocab_size", [8192, 300])
def test_there_and_back(vocab_size, centres):
    tokens = LayoutTokens(vocab_size, 5, True, centres)
    sentence = tokens.build(OBJECTS, (0.0, 0.0, 0.8, 0.9))
    assert sentence.shape == (tokens.length,) and sentence.dtype == np.int32
    objects, crop = tokens.inverse(sentence)
    step = 0.5 / (tokens.side - 1) + 1e-6  # half a place
    np.testing.assert_allclose(crop, (0.0, 0.0, 0.8, 0.9), atol=step)
    assert [o.label for o in objects] == [7, 0]
    for found, (_, box) in zip(objects, OBJECTS, strict=True):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        expected = (x, y, x, y) if centres else box
        np.testing.assert_allclose(found.box, expected, atol=step)


def test_a_point_outside_the_picture_has_the_nearest_place_inside():
    for outside, nearest in (((-0.3, 0.5), (0, 0.5)), ((1.7, -2), (1, 0)), ((0.2, 1.01), (0.2, 1))):
        assert PAPER.place(*outside) == PAPER.place(*nearest)


def test_objects_outside_the_crop_are_left_out_and_boxes_follow_it_unless_it_is_told():
    crop = (0.4, 0.0, 0.9, 0.5)
    hidden = [*OBJECTS, Object(3, (0.0, 0.6, 0.3, 0.9))]
    assert [o.label for o in PAPER.inverse(PAPER.build(hidden, crop))[0]] == [7, 0]
    relative = LayoutTokens(encode_crop=False)
    (first, second), _ = relative.inverse(relative.build(hidden, crop))
    np.testing.assert_allclose(first.box, (0.0, 0.4, 0.2, 1.0), atol=0.01)
    assert second.box == inside(OBJECTS[1].box, crop) == (0.0, 0.0, 1.0, 1.0)
    centres = LayoutTokens(encode_crop=False, centres=True)
    (first, second), _ = centres.inverse(centres.build(hidden, crop))
    np.testing.assert_allclose(first.box, (0.1, 0.7) * 2, atol=0.01)
    np.testing.assert_allclose(second.box, (0.5, 0.5) * 2, atol=0.01)
    np.testing.assert_allclose(mirrored(mirrored(OBJECTS[0].box)), OBJECTS[0].box)
    np.testing.assert_allclose(mirrored((0.1, 0.2, 0.5, 0.6)), (0.5, 0.2, 0.9, 0.6))


@pytest.mark.parametrize(
    "box",
    [(0.0, 0.4, 0.3, 0.6), (0.7, 0.4, 1.0, 0.6), (0.4, 0.0, 0.6, 0.3), (0.4, 0.7, 0.6, 1.0)],
)
def test_an_object_on_either_side_of_the_crop_is_left_out(box):
    assert PAPER.inverse(PAPER.build([Object(3, box)], (0.3, 0.3, 0.7, 0.7)))[0] == []


def test_too_many_objects_are_cut_off_and_the_order_is_random_only_with_a_generator():
    many = [Object(i, (0, 0, 1, 1)) for i in range(40)]
    sentence = PAPER.build(many)
    np.testing.assert_array_equal(sentence[:90:3], range(30))
    shuffled = PAPER.build(many, rng=np.random.default_rng(0))[:90:3]
    assert sorted(shuffled) == list(range(30)) and list(shuffled) != list(range(30))
    with pytest.raises(ValueError, match=r"class 8191 must lie in \[0, 8191\)"):
        PAPER.build([Object(8191, (0, 0, 1, 1))])


def test_attributes_are_part_of_the_class():
    every = {"group": True, "occluded": True, "depiction": True, "inside": True}
    assert attribute_label(12, 354) == 12
    assert attribute_label(12, 354, depiction=True) == 12 + 354 * 4
    assert attribute_label(353, 354, **every) == 354 * 16 - 1


def test_the_plot_has_a_colour_for_each_class_along_its_box():
    picture = plot([Object(1, (0.25, 0.25, 0.75, 0.75))], 64, ["a", "b"])
    assert picture.shape == (64, 64, 3)
    edge = picture[14:18, 30:45].min(0)  # the upper edge, wherever it is rounded to
    assert (edge == edge[0]).all() and (edge[0] != 255).any()
    assert (picture[40:45, 40:45] == 255).all()


def test_boxes_may_jut_out_but_are_shares_and_have_labels():
    boxes = np.array([[-0.01, 0, 0.5, 1.0000001]])
    assert as_objects(boxes, [3]) == [Object(3, (-0.01, 0.0, 0.5, 1.0000001))]
    assert as_objects(np.zeros((0, 4)), []) == []
    for box in ([0, 0, 9, 9], [0.5, 0, 0.2, 1], [0, 0.5, 1, 0.2], [-9, 0, 1, 1]):
        with pytest.raises(ValueError, match=r"a box is \(.*, expected left, top, right, bottom"):
            as_objects(np.array([box], float), [3])
    with pytest.raises(ValueError, match="1 boxes and 2 labels"):
        as_objects(boxes, [3, 4])
