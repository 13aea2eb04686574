"""The contract over the table of conditioners, and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import example_keys, init_key
from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets.conditioners import CONDITIONERS, combine, make_conditioner
from latent_diffusion.nets.resize import cubic
from latent_diffusion.process.diffusion import q_sample
from latent_diffusion.process.schedules import make_schedule

SMALL = {
    "layout": {"vocab_size": 26, "max_length": 8, "width": 6, "depth": 1}
    | {"num_heads": 2, "head_dim": 3},
    "spatial_rescaler": {"num_classes": 4, "num_stages": 1, "out_channels": 2},
    "low_res": {"num_levels": 40, "max_noise_level": 30, "width": 6},
    "masked_image": {},
    "depth": {},
    "neighbours": {"num_neighbours": 2, "width": 6},
    "image_embedding": {"width": 6},
    "class_label": {"num_classes": 5, "width": 6},
    "clip_text": {"vocab_size": 11, "max_length": 4, "width": 6, "depth": 2, "num_heads": 2}
    | {"empty": (9, 10), "pad_id": 1},
    "clip_text_2": {"vocab_size": 11, "max_length": 4, "width": 6, "depth": 2, "num_heads": 2}
    | {"empty": (9, 10), "pad_id": 1, "skip_last": 1, "final_norm": False, "projection_dim": 6}
    | {"repad": True},
    "bert": {"vocab_size": 11, "max_positions": 5, "width": 6, "depth": 1, "num_heads": 2}
    | {"empty": (9, 10)},
    "clip_image": {"image_size": 6, "patch_size": 3, "width": 6, "depth": 1, "num_heads": 2}
    | {"projection_dim": 6},
    "text": {"vocab_size": 11, "max_length": 4, "width": 6, "depth": 1}
    | {"num_heads": 2, "head_dim": 3},
    "t5_text": {"vocab_size": 11, "max_length": 4, "width": 6, "depth": 1, "num_heads": 2}
    | {"head_dim": 3, "mlp_width": 8, "empty": (9, 10)},
    "word_map": {"vocab_size": 11, "height": 4, "width": 4, "channels": 2},
    "layout_map": {"vocab_size": 25, "max_length": 8, "height": 4, "width": 4, "channels": 2},
    "sizes": {"width": 6},
    "start": {},
    "class_token": {"num_classes": 5, "null": 5},
    "layout_tokens": {"vocab_size": 26, "max_length": 8},
    "segmentation_tokens": {"num_classes": 4, "factor": 2, "null": 4},
    "coordinates": {"num_places": 16, "factor": 2},
    "code_map": {"key": "segmentation", "null": 9}
    | {
        "autoencoder": {"channels": 4, "channel_mult": (1, 1), "num_res_blocks": 1}
        | {"num_groups": 2, "z_channels": 2, "embed_dim": 2, "image_channels": 4}
        | {"regularization": "vq", "num_codes": 5}
    },
}
TELLING = [name for name in CONDITIONERS if name not in ("start", "coordinates", "sizes")]
NUMPY = np.random.default_rng(0)


def _random(*shape):
    return jnp.asarray(NUMPY.uniform(-1, 1, shape), jnp.float32)


BATCH = {
    "image": _random(3, 8, 8, 3),
    "mask": (_random(3, 8, 8, 1) > 0).astype(jnp.float32),
    "low_res": _random(3, 4, 4, 3),
    "depth": 5 + _random(3, 6, 6, 1),
    "segmentation": jnp.asarray(NUMPY.integers(0, 4, (3, 8, 8)), jnp.int32),
    "layout": jnp.array(
        [[3, 0, 12, 7, 6, 24, 0, 24], [1, 2, 14, 24, 0, 0, 0, 24], [5, 0, 24] * 2 + [6, 18]]
    ),
    "neighbours": _random(3, 2, 6),
    "image_embedding": _random(3, 6),
    "class_label": jnp.array([0, 4, 2]),
    "original_size": jnp.array([[8, 9], [600, 400], [1024, 1024]]),
    "crop_top_left": jnp.array([[0, 0], [0, 56], [7, 0]]),
    "target_size": jnp.array([[8, 8], [512, 384], [1024, 1024]]),
    "aesthetic_score": jnp.array([2.5, 6.0, 7.0]),
    "tokens": jnp.array([[2, 3, 0, 0], [4, 0, 0, 0], [5, 6, 7, 8]]),
}
NEVER, ALWAYS = jnp.zeros(3, bool), jnp.ones(3, bool)


KEYS = example_keys(jax.random.key(1), 3)


class HalfSize:
    """Stands in for a first stage with f=2: the mean of 2×2 pixels, and a constant added."""

    @staticmethod
    def encode(batch):
        return batch["image"].reshape(-1, 4, 2, 4, 2, 3).mean((2, 4)) + 0.25


def _conditioning(config, drop, batch=BATCH, size=(4, 4)):
    conditioner = make_conditioner(config)
    batch = conditioner.prepare(batch, HalfSize, size, KEYS)
    params = jax.jit(conditioner.init)(init_key(0), batch, NEVER)
    return conditioner.apply(params, batch, drop)


def _apply(config, drop, batch=BATCH, size=(4, 4)):
    return jax.tree.leaves(_conditioning(config, drop, batch, size))[0]


@pytest.mark.parametrize("name", TELLING)
def test_drop_is_per_example_and_hides_the_condition(name):
    config = {name: SMALL[name]}
    never, always = _apply(config, NEVER), _apply(config, ALWAYS)
    mixed = _apply(config, jnp.array([True, False, False]))
    np.testing.assert_allclose(always, np.broadcast_to(always[:1], always.shape), atol=1e-6)
    assert np.abs(never - always).max() > 1e-3
    np.testing.assert_allclose(mixed, jnp.concatenate([always[:1], never[1:]]), atol=1e-6)


def test_the_null_of_a_layout_is_the_layout_without_objects():
    empty = {"layout": jnp.full_like(BATCH["layout"], SMALL["layout"]["vocab_size"] - 1)}
    config = {"layout": SMALL["layout"]}
    np.testing.assert_array_equal(_apply(config, ALWAYS), _apply(config, NEVER, empty))


@pytest.mark.parametrize("name", ["text", "layout"])
def test_the_inner_width_of_attention_is_that_of_its_heads(name):
    conditioner = make_conditioner({name: SMALL[name] | {"num_heads": 3, "head_dim": 5}})
    params = jax.eval_shape(conditioner.init, init_key(0), BATCH, NEVER)
    kernels = [x for path, x in leaves_by_path(params).items() if path.endswith("to_q/kernel")]
    assert kernels and {x.shape[1] for x in kernels} == {15}


def test_latents_of_the_masked_image_in_both_orders():
    paper = _apply({"masked_image": {}}, NEVER)
    hole = BATCH["mask"] > 0.5
    latents = HalfSize.encode({"image": jnp.where(hole, -1.0, BATCH["image"])})
    np.testing.assert_allclose(paper[..., :3], latents, atol=1e-6)
    # The mask takes pixel ⌊2i⌋, and is −1 or 1.
    np.testing.assert_array_equal(paper[..., 3:], 2 * BATCH["mask"][:, ::2, ::2] - 1)
    fields = {"mask_first": True, "known_mask": 0.0, "hole": 0.0, "keep": True}
    other = _apply({"masked_image": fields}, ALWAYS)
    np.testing.assert_array_equal(other[..., :1], BATCH["mask"][:, ::2, ::2])
    grey = HalfSize.encode({"image": jnp.where(hole, 0.0, BATCH["image"])})
    np.testing.assert_allclose(other[..., 1:], grey, atol=1e-6)


def test_label_maps_are_shares_of_the_pixels_and_a_map_of_them():
    shares = _apply({"spatial_rescaler": SMALL["spatial_rescaler"] | {"out_channels": 0}}, NEVER)
    labels = np.asarray(BATCH["segmentation"]).reshape(3, 4, 2, 4, 2)
    for label in range(4):
        np.testing.assert_allclose(shares[..., label], (labels == label).mean((2, 4)))
    assert _apply({"spatial_rescaler": SMALL["spatial_rescaler"]}, NEVER).shape == (3, 4, 4, 2)


def test_noise_on_the_small_picture_is_that_of_its_level_and_its_key():
    noise = {"low_res": SMALL["low_res"]}
    assert _apply({"low_res": {}}, NEVER) is not None
    np.testing.assert_array_equal(_apply({"low_res": {}}, NEVER), BATCH["low_res"])
    conditioner = make_conditioner(noise)
    assert (conditioner.keys, conditioner.optional) == (("low_res",), ("noise_level",))
    schedule = make_schedule("linear", 40, 1e-4, 2e-2)
    level = jnp.array([0, 20, 39])
    told = BATCH | {"noise_level": level}
    noised = conditioner.prepare(told, None, (4, 4), KEYS)["low_res"]
    clean = q_sample(schedule, BATCH["low_res"], level, jnp.zeros((3, 4, 4, 3)))
    spread = jnp.std(noised - clean, axis=(1, 2, 3)) / schedule.sigma_t(level)
    np.testing.assert_allclose(spread, 1.0, atol=0.3)
    # Drawn levels lie below max_noise_level, and each has a vector of its own.
    many = {"low_res": jnp.zeros((200, 4, 4, 3))}
    keys = example_keys(jax.random.key(2), 200)
    drawn = conditioner.prepare(many, None, (4, 4), keys)["noise_level"]
    assert int(drawn.min()) == 0 and int(drawn.max()) == 29
    few = make_conditioner({"low_res": {"num_levels": 5}})  # fewer than max_noise_level
    assert int(few.prepare(many, None, (4, 4), keys)["noise_level"].max()) == 4
    vectors = _conditioning(noise, NEVER, told).vector
    assert float(jnp.abs(vectors[0] - vectors[1]).max()) > 0.1


def test_depth_is_resized_like_bicubic_and_spans_its_own_range():
    depth = _apply({"depth": {}}, NEVER)
    np.testing.assert_allclose(depth.min((1, 2, 3)), -1.0, atol=1e-6)
    np.testing.assert_allclose(depth.max((1, 2, 3)), 1.0, atol=2e-3)
    np.testing.assert_allclose(cubic(12, 24).sum(1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(cubic(5, 5), np.eye(5))
    # By torch's kernel: (a + 2)x³ − (a + 3)x² + 1 below 1, a(x³ − 5x² + 8x − 4) below 2; a = −3/4.
    quarters = [-0.03515625, 0.26171875, 0.87890625, -0.10546875]
    np.testing.assert_allclose(cubic(8, 16)[6, 1:5], quarters, atol=1e-6)
    aligned = cubic(5, 9, align_corners=True)  # every second sample is one of the old
    np.testing.assert_allclose(aligned[::2], np.eye(5), atol=1e-6)
    np.testing.assert_allclose(aligned[3, :4], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-6)


def test_what_is_kept_stays_while_the_rest_is_dropped():
    config = {"low_res": {"keep": True}, "text": SMALL["text"]}
    never, always = _conditioning(config, NEVER), _conditioning(config, ALWAYS)
    np.testing.assert_array_equal(never.concat, always.concat)
    assert float(jnp.abs(never.context - always.context).max()) > 1e-3


def test_sizes_are_sinusoids_in_the_order_of_sdxl_and_stay_where_conditions_are_dropped():
    def sinusoid(number):  # cosines first, frequencies from 1 to 1/10000 (exclusive)
        angles = float(number) * 10_000.0 ** (-np.arange(3) / 3)
        return [*np.cos(angles), *np.sin(angles)]

    vector = _conditioning({"sizes": {"width": 6}}, NEVER).vector
    expected = [sinusoid(number) for number in (600, 400, 0, 56, 512, 384)]
    np.testing.assert_allclose(vector[1], np.ravel(expected), atol=1e-4)
    np.testing.assert_array_equal(_conditioning({"sizes": {"width": 6}}, ALWAYS).vector, vector)
    refiner = _conditioning({"sizes": {"width": 6, "aesthetic_score": True}}, NEVER).vector
    np.testing.assert_array_equal(refiner[:, :24], vector[:, :24])
    np.testing.assert_allclose(refiner[0, 24:], sinusoid(2.5), atol=1e-6)
    assert _conditioning({"sizes": {}}, NEVER).vector.shape == (3, 6 * 256)


def test_an_embedding_is_a_token_or_a_vector():
    width = {"width": 6}
    token = _conditioning({"image_embedding": width}, NEVER).context
    np.testing.assert_array_equal(token[:, 0], BATCH["image_embedding"])
    vector = _conditioning({"image_embedding": width | {"route": "vector"}}, NEVER).vector
    np.testing.assert_array_equal(vector, BATCH["image_embedding"])


def test_no_conditioner_is_unconditional():
    conditioner = make_conditioner({})
    assert jax.tree.leaves(conditioner.apply({}, {}, NEVER)) == []
    assert conditioner.keys == ()


@pytest.mark.parametrize(
    ("name", "row"), [("text", [0, 0, 0, 0]), ("clip_text", [9, 10, 1, 1]), ("bert", [9, 10, 0, 0])]
)
def test_the_empty_prompt_is_the_null_condition(name, row):
    config = {name: SMALL[name]}
    empty = BATCH | {"tokens": jnp.array([row] * 3)}
    np.testing.assert_allclose(_apply(config, NEVER, empty), _apply(config, ALWAYS), atol=1e-6)


def test_a_prompt_is_the_sum_of_its_words_maps():
    config = {"word_map": SMALL["word_map"]}

    def maps(*tokens):
        return _apply(config, NEVER, {"tokens": jnp.array([tokens] * 3)})

    both = maps(2, 3, 0, 0)
    np.testing.assert_allclose(both, maps(2, 0, 0, 0) + maps(3, 0, 0, 0), atol=1e-6)
    np.testing.assert_array_equal(maps(0, 0, 0, 0), np.zeros((3, 4, 4, 2)))
    np.testing.assert_array_equal(_apply(config, ALWAYS), np.zeros((3, 4, 4, 2)))


def test_a_layout_fills_its_boxes():
    config = {"layout_map": SMALL["layout_map"] | {"channels": 3}}

    def filled(*tokens):
        own = {"layout_map": config["layout_map"] | {"max_length": len(tokens)}}
        return _apply(own, NEVER, {"layout": jnp.array([tokens] * 3)})[0]

    none, whole = 24, (0, 24)  # 5×5 places: 0 is the top left corner, 24 the bottom right
    picture = filled(1, 0, 7, 2, 12, 24, none, none, none)
    one, two = filled(1, *whole)[0, 0], filled(2, *whole)[0, 0]
    assert np.abs(one - two).max() > 0.1
    rows, columns = np.zeros((2, 4)), np.zeros((2, 4))
    rows[0, :1], columns[0, :2], rows[1, 2:], columns[1, 2:] = 1, 1, 1, 1
    expected = np.einsum("nh,nw,nc->hwc", rows, columns, np.stack([one, two]))
    np.testing.assert_allclose(picture, expected, atol=1e-6)
    # Half a cell is half a vector; and of a picture cut to its left half, boxes are twice as wide.
    wide = {"layout_map": config["layout_map"] | {"width": 2, "height": 2, "max_length": 3}}
    quarter = {"layout": jnp.array([[1, 0, 21]] * 3)}  # of the side
    half = _apply(wide, NEVER, quarter, (2, 2))[0]
    np.testing.assert_allclose(half[:, 0], np.stack([one, one]) / 2, atol=1e-6)
    np.testing.assert_allclose(filled(1, 0, 21, 0, 22), filled(1, 0, 22), atol=1e-6)
    np.testing.assert_array_equal(_apply(config, ALWAYS), np.zeros((3, 4, 4, 3)))
    with pytest.raises(ValueError, match="layout_map: 3 tokens, expected max_length=8"):
        _apply(config, NEVER, {"layout": jnp.array([[1, 0, 24]] * 3)})


def test_prompts_of_another_length_are_refused():
    for name in ("text", "clip_text"):
        with pytest.raises(ValueError, match="4 tokens a prompt, expected max_length=7"):
            _apply({name: SMALL[name] | {"max_length": 7}}, NEVER)
    with pytest.raises(ValueError, match="4 tokens a prompt, at most max_positions=3"):
        _apply({"bert": SMALL["bert"] | {"max_positions": 3}}, NEVER)
    with pytest.raises(ValueError, match=r"no room for empty=\(1, 2, 3, 4, 5\)"):
        _apply({"text": SMALL["text"] | {"empty": (1, 2, 3, 4, 5)}}, NEVER)


def test_clip_never_looks_ahead():
    config = {"clip_text": SMALL["clip_text"]}
    before = _apply(config, NEVER)
    after = _apply(config, NEVER, BATCH | {"tokens": BATCH["tokens"].at[:, 3].set(7)})
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-6)
    assert np.abs(after[:, 3] - before[:, 3])[:2].max() > 1e-3


def test_bert_ignores_padding_and_pools_over_the_prompt():
    config = {"bert": SMALL["bert"]}
    states = _apply(config, NEVER)
    longer = BATCH | {"tokens": jnp.pad(BATCH["tokens"], ((0, 0), (0, 1)))}
    np.testing.assert_allclose(_apply(config, NEVER, longer)[:, :4], states, atol=1e-6)
    mean = _apply({"bert": SMALL["bert"] | {"pooling": "mean"}}, NEVER)
    assert mean.shape == (3, 1, 6)
    np.testing.assert_allclose(mean[0, 0], states[0, :2].mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="pooling='max'; known: tokens, mean"):
        _apply({"bert": SMALL["bert"] | {"pooling": "max"}}, NEVER)


def test_a_skipped_layer_has_no_parameters():
    conditioner = make_conditioner({"clip_text": SMALL["clip_text"] | {"skip_last": 1}})
    params = jax.eval_shape(conditioner.init, jax.random.key(0), BATCH, NEVER)["params"]
    assert "layers_0" in params["clip_text"] and "layers_1" not in params["clip_text"]


def test_class_labels_outside_the_range_are_the_null_class():
    config = {"class_label": SMALL["class_label"] | {"route": "vector"}}
    odd = BATCH | {"class_label": jnp.array([-1, 5, 99])}
    np.testing.assert_array_equal(_apply(config, NEVER, odd), _apply(config, ALWAYS))
    assert _apply(config, NEVER).shape == (3, 6)


def test_several_conditioners_join_along_their_axes():
    config = {name: SMALL[name] for name in ("class_label", "text")}
    assert _apply(config, NEVER).shape == (3, 1 + 4, 6)
    # A hybrid: one condition beside the latent, many to attend to, one with the timestep.
    # Those that change another one: the second of CLIP's, and T5, whose tokens lie behind CLIP's.
    one_text = [name for name in CONDITIONERS if name not in ("clip_text_2", "t5_text")]
    hybrid = _conditioning({name: SMALL[name] for name in one_text}, NEVER)
    assert hybrid.concat.shape == (3, 4, 4, 2 + 3 + (3 + 1) + 1 + 2 + 2)
    assert hybrid.context.shape == (3, 1 + 3 * 4 + 1 + 8 + 2 + 1, 6)
    assert hybrid.vector.shape == (3, 6 + 6 * 6)
    assert hybrid.tokens.shape == (3, 1 + 1 + 8) and hybrid.token_maps.shape == (3, 3, 4, 4)
    both = combine(
        [
            Conditioning(concat=jnp.zeros((1, 2, 2, 3)), vector=jnp.zeros((1, 4))),
            Conditioning(concat=jnp.ones((1, 2, 2, 1)), context=jnp.ones((1, 2, 5))),
        ]
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(both)]
    assert shapes == [(1, 2, 2, 4), (1, 2, 5), (1, 4)]


def test_conditions_that_can_not_be_joined_are_named():
    config = {"class_label": SMALL["class_label"] | {"width": 5}, "text": SMALL["text"]}
    with pytest.raises(ValueError, match=r"context of the shapes \[3, 1, 5\] and \[3, 4, 6\], "):
        _apply(config, NEVER)
    config = {name: SMALL[name] for name in ("spatial_rescaler", "word_map")}
    config["spatial_rescaler"] = config["spatial_rescaler"] | {"num_stages": 2}
    with pytest.raises(ValueError, match=r"concat of the shapes \[3, 2, 2, 2\] and \[3, 4, 4, 2\]"):
        _apply(config, NEVER)


def test_a_wrong_condition_is_named():
    with pytest.raises(ValueError, match="unknown conditioner 'clip'; known: bert, class_label, "):
        make_conditioner({"clip": {}})
    with pytest.raises(ValueError, match="unknown field 'num_class'; known: num_classes"):
        make_conditioner({"class_label": {"num_class": 3}})
    with pytest.raises(ValueError, match=r"needs tokens; the batch has class_label"):
        _apply({"text": SMALL["text"]}, NEVER, {"class_label": BATCH["class_label"]})
    with pytest.raises(ValueError, match="4 tokens a prompt, expected max_length=7"):
        _apply({"text": SMALL["text"] | {"max_length": 7}}, NEVER)
    for name in ("class_label", "image_embedding"):
        with pytest.raises(ValueError, match=f"{name}.route='concat'; known: context, vector"):
            _apply({name: SMALL[name] | {"route": "concat"}}, NEVER)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("layout", {"layout": BATCH["layout"][:, :5]}, "layout: 5 tokens, expected max_length=8"),
        ("low_res", {"low_res": BATCH["low_res"][:, :3]}, "3×4 pixels, but the latent is 4×4"),
        ("masked_image", {"mask": BATCH["mask"][:, :4]}, "mask is 4×8, but the image is 8×8"),
        ("neighbours", {"neighbours": BATCH["neighbours"][..., :5]}, "5 numbers, expected width=6"),
        ("image_embedding", {"image_embedding": jnp.zeros((3, 5))}, "5 numbers, expected width=6"),
        ("spatial_rescaler", {"segmentation": BATCH["segmentation"][:, :7]}, "7×8 can't be halved"),
    ],
)
def test_a_condition_of_the_wrong_size_is_named(name, changed, message):
    with pytest.raises(ValueError, match=message):
        _apply({name: SMALL[name]}, NEVER, BATCH | changed)
