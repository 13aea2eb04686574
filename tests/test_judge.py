"""Judges of samples."""

import numpy as np

from demo import judge

RED, ORANGE, BLUE = (200, 30, 30), (240, 130, 20), (30, 60, 200)


def picture(colour, size=16):
    """A square of a colour on white, with a black outline."""
    image = np.full((size, size, 3), 255, np.uint8)
    image[2:-2, 2:-2] = 0
    image[3:-3, 3:-3] = colour
    return image


def test_a_colour_is_right_if_its_own_picture_is_the_nearest_of_its_shape():
    real = {
        "red heart": picture(RED),
        "orange heart": picture(ORANGE),
        "blue square": picture(BLUE),
        "grey circle": picture((150, 150, 150)),  # nearer, but of another shape
    }
    asked = ["red heart", "red heart", "orange heart", "blue square"]
    samples = np.stack(
        [picture(c) for c in ((180, 60, 50), (235, 110, 40), ORANGE, (100, 110, 190))]
    )
    assert judge.colour_accuracy(samples, asked, real) == 3 / 4
    assert judge.colour_accuracy(np.stack([*real.values()]), [*real], real) == 1
    assert judge.colour_accuracy(samples[:1], ["orange heart"], real) == 0


def test_the_colour_of_a_mottled_picture_is_its_median():
    image = picture(RED)
    image[4:6, 4:12] = ORANGE  # a quarter of the middle half
    np.testing.assert_array_equal(judge.middle_colours(image[None]), [RED])
