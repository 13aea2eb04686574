"""Requests of the HTTP API that name adapters: control nets, image prompts, changes of weights."""

import numpy as np
import pytest
from test_control import random_control
from test_image_prompts import random_adapter, style
from test_model import model
from test_serve import in_base64

from latent_diffusion.core.rng import seed_key
from latent_diffusion.serve.describe import describe
from latent_diffusion.serve.requests import Limits, call, read

LIMITS = Limits(max_pixels=64)
PICTURES = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
HINTS, LIKE = PICTURES[:, None] / np.float32(255), PICTURES[:, None] / np.float32(127.5) - 1
ADAPTERS = {"edges": random_control(), "like": random_adapter(), "style": style(0)}


def asked(picture, seed=1, **fields):
    """A request with adapters of all kinds, as JSON."""
    content = in_base64(picture)
    request = {"prompts": "red cat", "seed": seed, "num_steps": 2, "adapters": [["style", 0.5]]}
    request["controls"] = [["edges", content, 0.75]]
    return {**request, "image_prompts": [["like", content, 1]], **fields}


def test_requests_of_other_pictures_share_a_call_and_each_gets_its_own():
    made, like = model(), ADAPTERS["like"]
    first = read(asked(PICTURES[0], num_images=2), made, LIMITS, ADAPTERS)
    second = read(asked(PICTURES[1], seed=3), made, LIMITS, ADAPTERS)
    assert first.group == second.group
    together = made.sample(**call(made, [first, second]), mode="single")
    for i, (request, drawn) in enumerate(((first, together[:2]), (second, together[2:]))):
        want = made.sample(
            seed_key(request.seed),
            "red cat",
            num_images=request.num_images,
            num_steps=2,
            adapters=[(ADAPTERS["style"], 0.5)],
            controls=[(ADAPTERS["edges"], HINTS[i], 0.75)],
            image_prompts=[(like, LIKE[i], 1.0)],
            mode="single",
        )
        np.testing.assert_allclose(drawn, want, atol=1e-4)
    assert "controls" not in first.settings and "image_prompts" not in first.settings


def test_the_hint_determines_the_size_and_what_is_shared_must_be_equal():
    made = model()
    request = read(asked(PICTURES[0]), made, LIMITS, ADAPTERS)
    others = [
        asked(PICTURES[0], controls=[["edges", in_base64(PICTURES[0]), 0.5]]),
        asked(PICTURES[0], controls=[["edges", in_base64(PICTURES[0][:4]), 0.75]]),
        asked(PICTURES[0], controls=None),
        asked(PICTURES[0], image_prompts=[["like", in_base64(PICTURES[0]), 0.5]]),
    ]
    groups = {read(other, made, LIMITS, ADAPTERS).group for other in others}
    assert len(groups) == len(others) and request.group not in groups
    half = read(
        {"prompts": "red cat", "num_steps": 1, "controls": others[1]["controls"]},
        made,
        LIMITS,
        ADAPTERS,
    )
    assert made.sample(**call(made, [half]), mode="single").shape[1:3] == (4, 8)


def test_adapters_are_listed_by_the_field_that_takes_them():
    description = describe(model(), "tiny", LIMITS, ADAPTERS)
    fields = ("adapters", "controls", "image_prompts")
    assert [description[field] for field in fields] == [["style"], ["edges"], ["like"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": [["edges", 1]]}, "adapters: unknown adapter 'edges'; known: style"),
        ({"controls": [["like", "", 1]]}, "controls: unknown adapter 'like'; known: edges"),
        ({"controls": [["edges", 1]]}, r"controls: write \[\[adapter, picture in base64, weight"),
        ({"controls": "edges"}, "controls: write"),
        ({"controls": [["edges", "?", 1]]}, "the picture of edges must be a picture in base64"),
        ({"image_prompts": [["like", in_base64(PICTURES[0]), "1"]]}, "weight of like=1 must be"),
        ({"image_prompts": [["like", "", 1]] * 9}, "image_prompts: 9 entries, at most 8"),
        ({"controls": [["edges", in_base64(np.zeros((9, 9), np.uint8)), 1]]}, "9×9 are more"),
    ],
)
def test_bad_entries_are_refused_by_the_name_of_their_field(fields, message):
    with pytest.raises(ValueError, match=message):
        read({"prompts": "red cat", **fields}, model(), LIMITS, ADAPTERS)
