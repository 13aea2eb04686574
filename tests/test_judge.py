"""Judges of samples."""

import numpy as np
import pytest

from demo import components, judge, judged

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
        "grey circle": picture((150, 150, 150)),  # nearer, but of another shape or style
        "twemoji grey square": picture((150, 150, 150)),
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


def described(caption, colour, label=0):
    return {"caption": caption, "image": picture(colour, 32), "class_label": label}


def test_prompts_of_colours_are_shapes_of_one_colour():
    names = ("red heart", "twemoji red heart", "light blue heart", "red apple", "hollow red circle")
    coloured = judged.Coloured([described(name, RED) for name in names])
    assert coloured.prompts == ["red heart"] * 6 + ["twemoji red heart"] * 6
    assert coloured.accuracy(np.stack([picture(RED, 32)] * 12), coloured.prompts) == 1


def test_diversity_is_one_between_the_pictures_of_two_styles():
    both = [
        described([f"{style} {name}", name], colour)
        for style, colour in (("openmoji", RED), ("twemoji", BLUE))
        for name in ("heart", "square")
    ]
    diverse = judged.Diverse([*both, described(["openmoji one", "one"], RED)])
    assert set(diverse.prompts) == {"heart", "square"}
    pair = np.stack([picture(RED, 32), picture(BLUE, 32)])
    drawn = np.stack([pair] * len(diverse.prompts))
    assert diverse.diversity(drawn) == pytest.approx(1, rel=1e-4)
    assert diverse.diversity(drawn[:, [0, 0]]) == 0


def test_linear_latents_lose_the_least_of_the_pictures():
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (6, 8, 12, 1), np.uint8), 3, -1)
    linear = components.Linear(grey)
    np.testing.assert_array_equal(linear.reconstruct(grey, 16), grey)  # a number for each pixel
    coarse = rng.integers(0, 256, (6, 2, 3, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    linear = components.Linear(coarse)
    np.testing.assert_array_equal(linear.reconstruct(coarse, 3), coarse)  # three for each block
    assert (linear.reconstruct(coarse, 2) != coarse).any()
