"""What conditions are made of: holes, degradations, resizing, scenes, windows, neighbours."""

import numpy as np
import pytest
from PIL import Image

from configs import default
from latent_diffusion import data
from latent_diffusion.data import ArraySource, degradations, make_transform, retrieval
from latent_diffusion.data.degradations import (
    DEGRADATIONS,
    FULL,
    LIGHT,
    _order,
    _shrink,
    degrade,
    gaussian_kernel,
)
from latent_diffusion.data.embedders import Embedder
from latent_diffusion.data.layout import LayoutTokens
from latent_diffusion.data.masks import MASKS, draw_mask
from latent_diffusion.data.openmoji_scenes import NUM_OBJECTS, SUBJECTS, OpenMojiScenes
from latent_diffusion.data.resampling import MATRICES, PILLOW, resample
from latent_diffusion.data.retrieval import Database, load_database


def rng(seed=0):
    return np.random.default_rng(seed)


PICTURE = rng().integers(0, 256, (32, 32, 3)).astype(np.uint8)


def config(**changes):
    c = default.data()
    c.update({"image_size": 16, **changes})
    return c


# --- holes ---


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_zeros_and_ones_and_scale_with_the_picture(name):
    shares = {}
    for size in (64, 256):
        masks = [draw_mask(name, size, rng(seed)) for seed in range(60)]
        assert all(m.shape == (size, size, 1) and m.dtype == np.float32 for m in masks)
        assert {float(v) for m in masks for v in np.unique(m)} == {0.0, 1.0}
        shares[size] = np.mean([m.mean() for m in masks])
    assert 0.05 < shares[64] < 0.75
    np.testing.assert_allclose(shares[64], shares[256], rtol=0.15)
    np.testing.assert_array_equal(draw_mask(name, 64, rng(3)), draw_mask(name, 64, rng(3)))


def test_boxes_keep_their_distance_from_the_border():
    for seed in range(60):
        mask = draw_mask("boxes", 256, rng(seed))[..., 0]
        assert mask[9:-9, 9:-9].sum() == mask.sum() > 0


def test_shares_of_the_masks():
    full = np.mean([draw_mask("lama_or_all", 32, rng(i)).mean() == 1 for i in range(400)])
    assert 0.18 < full < 0.35
    assert all(draw_mask("lama_half", 32, rng(i)).mean() <= 0.5 for i in range(100))


# --- resizing and degradations ---


@pytest.mark.parametrize("name", [*MATRICES, *PILLOW])
def test_resizing_keeps_constants_and_the_size_asked_for(name):
    grey = np.full((12, 20, 3), 0.3, np.float32)
    for height, width in ((6, 5), (12, 20), (30, 24)):
        out = resample(grey, height, width, name)
        assert out.shape == (height, width, 3)
        np.testing.assert_allclose(out, 0.3, atol=1e-5)


def test_what_each_resizing_sees():
    row = np.zeros((16, 16, 1), np.float32)
    row[:, 8] = 1.0
    halves = {n: resample(row, 8, 8, n)[4, 3:6, 0] for n in [*MATRICES, *PILLOW]}
    np.testing.assert_allclose(halves["cv_nearest"], [0, 1, 0])
    np.testing.assert_allclose(halves["cv_area"], [0, 0.5, 0])
    np.testing.assert_allclose(halves["cv_bilinear"], [0, 0.5, 0])
    np.testing.assert_allclose(halves["cv_bicubic"], [0, 0.59375, 0], atol=1e-6)
    # MATLAB and Pillow agree away from the border; both see twice as far as OpenCV.
    np.testing.assert_allclose(halves["matlab_bicubic"], halves["pil_bicubic"], atol=1e-5)
    assert halves["matlab_bicubic"][0] > 0.05
    # sinc(x) · sinc(x / 4) at 1/2, −3/2 and 5/2, as a share of its sum over eight pixels; those of
    # the second row are negative, so that it is clipped to 0.
    near, far = np.sinc(0.5) * np.sinc(0.125), np.sinc(2.5) * np.sinc(0.625)
    total = 2 * (near + far + np.sinc(1.5) * np.sinc(0.375) + np.sinc(3.5) * np.sinc(0.875))
    np.testing.assert_allclose(halves["cv_lanczos"], [0, near / total, far / total], atol=1e-6)


def test_matlab_mirrors_the_picture_at_its_border():
    levels = np.linspace(0.1, 0.9, 12) ** 2
    mirrored = np.concatenate([levels[::-1], levels, levels[::-1]])
    image = np.repeat(mirrored[:, None, None], 4, 1).astype(np.float32)
    whole = resample(image, 18, 2, "matlab_bicubic")[6:12]
    alone = resample(image[12:24], 6, 2, "matlab_bicubic")
    np.testing.assert_allclose(alone, whole, atol=1e-6)


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("factor", [2, 4])
def test_degradations_give_a_smaller_picture_and_depend_on_the_generator_alone(name, factor):
    small = degrade(PICTURE, name, factor, rng(1))
    assert small.shape == (32 // factor, 32 // factor, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(small, degrade(PICTURE, name, factor, rng(1)))
    differs = (small != degrade(PICTURE, name, factor, rng(2))).any()
    assert differs == name.startswith("bsrgan")


def test_the_full_degradation_hurts_more_than_the_light_one_and_both_keep_the_picture():
    y, x = np.mgrid[:32, :32] / 31
    smooth = np.uint8(np.stack([x, y, 1 - x], -1) * 200 + 20)
    clean = degrade(smooth, "bicubic", 4, rng()).astype(float)
    errors = {
        name: np.mean([np.abs(degrade(smooth, name, 4, rng(i)) - clean).mean() for i in range(100)])
        for name in ("bsrgan", "bsrgan_light")
    }
    assert 1.3 * errors["bsrgan_light"] < errors["bsrgan"] < 40


@pytest.mark.parametrize(("strength", "divisor"), [(FULL, 1.0), (LIGHT, 4.0)])
def test_blurs_of_both_kinds_are_four_times_as_narrow_in_the_light_degradation(
    strength, divisor, monkeypatch
):
    round_ones, long_ones, kernel = [], [], degradations.gaussian_kernel

    def seen(size, covariance):
        widths = np.linalg.eigvalsh(covariance)
        (round_ones if np.ptp(widths) < 1e-9 else long_ones).append(widths.max())
        return kernel(size, covariance)

    monkeypatch.setattr(degradations, "gaussian_kernel", seen)
    for i in range(60):
        degradations._blur(PICTURE / np.float32(255), 2, rng(i), strength)
    for widths, widest in ((round_ones, (2.4 / divisor) ** 2), (long_ones, 6 / divisor)):
        assert len(widths) > 15 and 0.5 * widest < max(widths) <= widest


def test_picking_every_fourth_pixel_does_not_move_the_picture():
    ramp = np.broadcast_to(np.arange(96, dtype=np.float32)[:, None, None] / 96, (96, 96, 3))
    picked = _shrink(ramp, 4, rng(), resize_share=0.0)
    expected = (4 * np.arange(24) + 1.5) / 96
    np.testing.assert_allclose(picked[6:-6, 12, 0], expected[6:-6], atol=1e-3)
    kernel = gaussian_kernel(25, 4 * np.eye(2))
    np.testing.assert_allclose([kernel.sum(), kernel[12, 14] / kernel[12, 12]], [1, np.exp(-0.5)])


@pytest.mark.parametrize(("name", "low"), [("bsrgan", 30), ("bsrgan_light", 80)])
def test_a_degraded_picture_comes_out_of_jpeg(name, low, monkeypatch):
    """Of a quality of up to 95, which the degradation limits from below."""
    made, jpeg, qualities = [], degradations._jpeg, set()

    def seen(image, rng, quality):
        qualities.add(quality)
        made.append(jpeg(image, rng, quality))
        return made[-1]

    monkeypatch.setattr(degradations, "_jpeg", seen)
    for i in range(20):
        assert DEGRADATIONS[name](PICTURE / np.float32(255), 4, rng(i)) is made[-1]
    assert qualities == {(low, 95)} and len(made) > 20


def test_the_picture_is_shrunk_before_it_is_brought_to_size():
    names = ["blur", "shrink", "shrink to size", "noise"]
    orders = [_order(names, rng(i)) for i in range(50)]
    assert all(o.index("shrink") < o.index("shrink to size") for o in orders)
    assert len({tuple(o) for o in orders}) == 12
    assert LIGHT.blurs == 1


# --- scenes ---


@pytest.fixture(scope="module")
def scenes():
    """Drawings that are squares of one colour each, with a transparent border."""
    drawings = []
    for label in range(len(SUBJECTS)):
        rgba = np.zeros((24, 24, 4), np.uint8)
        rgba[4:-4, 4:-4] = (10 * label, 255 - 10 * label, 77, 255)
        drawings.append(Image.fromarray(rgba))
    return OpenMojiScenes(drawings, "train", 32)


def test_a_scene_shows_its_objects_in_their_boxes(scenes):
    for i in range(20):
        scene = scenes[i]
        labels, boxes, seen = scene["labels"], scene["boxes"], scene["segmentation"]
        assert NUM_OBJECTS[0] <= len(labels) == len(boxes) == len(set(labels)) <= NUM_OBJECTS[1]
        assert set(np.unique(seen)) <= {0, *(labels + 1)}
        # The last drawing is in front: its label map fills its box, in its colour.
        left, top, right, bottom = np.round(boxes[-1] * 32).astype(int)
        assert (seen[top:bottom, left:right] == labels[-1] + 1).mean() > 0.9
        colour = np.array([10 * labels[-1], 255 - 10 * labels[-1], 77])
        inner = scene["image"][top + 2 : bottom - 2, left + 2 : right - 2]
        np.testing.assert_array_equal(inner, np.broadcast_to(colour, inner.shape))
        rows, columns = np.nonzero(seen == labels[-1] + 1)
        assert rows.min() == top and columns.max() + 1 == right
    # A drawing lies where it hides little of those behind it.
    for i in range(100):
        assert set(scenes[i]["labels"] + 1) <= set(np.unique(scenes[i]["segmentation"]))
    again = OpenMojiScenes(scenes.drawings, "train", 32)[3]
    np.testing.assert_array_equal(again["image"], scenes[3]["image"])
    other = OpenMojiScenes(scenes.drawings, "test", 32)[3]
    assert (other["image"] != scenes[3]["image"]).any()


def test_label_maps_and_boxes_follow_the_picture(scenes):
    layout = {"vocab_size": 1024, "max_objects": 4, "encode_crop": False}
    made = make_transform(config(crop="random", shorter_side=24, flip=True, layout=layout), True)
    for i in range(20):
        out = made(scenes[i], rng(i))
        assert out["image"].shape == (16, 16, 3) and out["segmentation"].shape == (16, 16)
        assert out["layout"].shape == (12,)
        objects, _ = LayoutTokens(**layout).inverse(out["layout"])
        for label, (left, top, right, bottom) in objects:
            rows, columns = np.nonzero(out["segmentation"] == label + 1)
            if len(rows) > 4:  # what is seen of it lies in its box
                assert left * 16 - 1.5 <= columns.min() and columns.max() < right * 16 + 1.5
                assert top * 16 - 1.5 <= rows.min() and rows.max() < bottom * 16 + 1.5


def test_evaluation_tells_objects_in_their_order(scenes):
    layout = LayoutTokens(vocab_size=1024, max_objects=4)
    made = make_transform(config(layout={"vocab_size": 1024, "max_objects": 4}), train=False)
    for i in range(8):
        objects, _ = layout.inverse(made(scenes[i], rng(i))["layout"])
        assert [label for label, _ in objects] == list(scenes[i]["labels"])
    train = make_transform(config(layout={"vocab_size": 1024, "max_objects": 4}), train=True)
    orders = {tuple(train(scenes[0], rng(i))["layout"][:12:3]) for i in range(20)}
    assert len(orders) > 1 and len({tuple(sorted(order)) for order in orders}) == 1


def test_the_transform_makes_what_the_config_names():
    made = make_transform(config(low_res="bicubic", mask="boxes"), train=False)
    out = made({"image": PICTURE}, rng())
    assert out["low_res"].shape == (4, 4, 3) and out["mask"].shape == (16, 16, 1)
    assert -1 <= out["low_res"].min() < -0.01 < 0.01 < out["low_res"].max() <= 1
    assert set(make_transform(config(), train=False)({"image": PICTURE}, rng())) == {"image"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_res": "bicubik"}, "unknown data.low_res 'bicubik'; known: bicubic, bsrgan"),
        ({"mask": "cats"}, "unknown data.mask 'cats'; known: boxes, lama"),
        ({"low_res": "bicubic", "low_res_factor": 3}, "low_res_factor=3 doesn't divide 16×16"),
        ({"low_res": "bicubic", "low_res_factor": 0}, "low_res_factor=0 doesn't divide 16×16"),
        ({"layout": {"vocab_size": 99}}, "no boxes for a layout; the example has: image"),
        ({"embedding": "resnet"}, "unknown data.embedding 'resnet'; known: alexnet"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        if "embedding" in changes:
            retrieval.embeddings_of(ArraySource({"image": [PICTURE]}), config(**changes), "test")
        make_transform(config(**changes), train=False)({"image": PICTURE}, rng())


# --- neighbours ---


@pytest.mark.parametrize("search_by", retrieval.SEARCHES)
def test_search_is_exact_and_leaves_out_itself(tmp_path, search_by, monkeypatch):
    monkeypatch.setattr(retrieval, "ROWS", 20)  # queries in three parts
    table = rng(1).normal(size=(50, 6)).astype(np.float32)
    queries = rng(2).normal(size=(7, 6)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, table)]
    cosines = unit[0] @ unit[1].T
    base = Database(table, search_by=search_by)
    places, scores = base.search(queries, 4)
    np.testing.assert_array_equal(places, np.argsort(-cosines, axis=1)[:, :4])
    np.testing.assert_allclose(scores, np.sort(cosines, axis=1)[:, :-5:-1], atol=1e-6)
    own = np.arange(50)
    np.testing.assert_array_equal(base.search(table, 1)[0][:, 0], own)
    others = np.argsort(-(unit[1] @ unit[1].T - 9 * np.eye(50)), axis=1)
    np.testing.assert_array_equal(base.search(table, 5, own)[0], others[:, :5])
    far = (own + 1) % 50  # an exclusion that isn't among the nearest
    np.testing.assert_array_equal(base.search(table, 1, far)[0][:, 0], own)
    with pytest.raises(ValueError, match="k=50 neighbours of 49 embeddings"):
        base.search(table, 50, own)
    Database(table, ("a", "b")).save(tmp_path / "base.npz")
    read = load_database(tmp_path / "base.npz")
    np.testing.assert_array_equal(read.embeddings, table)
    assert read.names == ("a", "b")
    Database(np.where(table == table[3, 0], np.nan, table)).save(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match=r"nan\.npz: embedding has numbers that are not finite"):
        load_database(tmp_path / "nan.npz")
    np.savez(tmp_path / "other.npz", embedding=table)
    with pytest.raises(ValueError, match=r"other\.npz: it holds no database .*: no name"):
        load_database(tmp_path / "other.npz")
    Database(np.arange(3)).save(tmp_path / "flat.npz")
    with pytest.raises(ValueError, match=r"flat\.npz: embedding is int64 \[3\], expected floats"):
        load_database(tmp_path / "flat.npz")
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad\.npz: no \.npz file"):
        load_database(tmp_path / "bad.npz")


def test_examples_carry_embeddings_and_their_neighbours_of_the_training_set(monkeypatch):
    colours = rng(3).integers(0, 256, (9, 1, 1, 3)).astype(np.uint8)
    pictures = np.broadcast_to(colours, (9, 16, 16, 3))
    corner = Embedder(3, {}, lambda params, x: x[:, 0, 0] * 127.5 + 127.5)
    monkeypatch.setattr(retrieval, "make_embedder", lambda name, path: corner)
    monkeypatch.setattr(retrieval, "_MADE", {})
    train, test = (ArraySource({"image": list(p)}) for p in (pictures[:6], pictures[6:]))
    wanted = config(embedding="alexnet", num_neighbours=2)
    for split, source in (("train", train), ("test", test)):
        example = retrieval.with_embeddings(source, split, train, wanted)[1]
        own = example["image"][0, 0].astype(np.float32)
        np.testing.assert_allclose(example["image_embedding"], own, rtol=1e-5, atol=1e-4)
        base = colours[:6, 0, 0].astype(np.float32)
        cosines = base @ own / np.linalg.norm(base, axis=1) / np.linalg.norm(own)
        best = [i for i in np.argsort(-cosines) if split == "test" or i != 1][:2]
        np.testing.assert_allclose(example["neighbours"], base[best], rtol=1e-5, atol=1e-4)
    assert len(retrieval._MADE) == 2  # the training set once
    test.arrays["image"] = [np.pad(x, ((0, 0), (24, 24), (0, 0))) for x in pictures[6:]]
    middle = colours[6, 0, 0]
    for crop, seen in (
        ("squash", 0),
        ("center", middle),
        ("random", middle),
    ):  # black corner or not
        cut = config(embedding="alexnet", crop=crop)
        corner_seen = retrieval.with_embeddings(test, "test", train, cut)[0]["image_embedding"]
        np.testing.assert_allclose(corner_seen, seen, rtol=1e-5, atol=1e-4)


def test_neighbours_of_test_pictures_are_training_pictures(monkeypatch):
    mean = Embedder(3, {}, lambda params, x: x.mean((1, 2)))
    monkeypatch.setattr(retrieval, "make_embedder", lambda name, path: mean)
    monkeypatch.setattr(retrieval, "_MADE", {})
    wanted = config(name="synthetic", image_size=8, embedding="alexnet", num_neighbours=2)
    train, test = (data.make_source(wanted, split) for split in ("train", "test"))
    known = train.columns["image_embedding"]
    for row in test.columns["neighbours"].reshape(-1, 3):
        assert (known == row).all(1).any()
