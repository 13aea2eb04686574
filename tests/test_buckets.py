"""Batches of pictures of many shapes: one bucket each, little cut away, nothing repeated."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from latent_diffusion import data
from latent_diffusion.data.buckets import assign, bucket_sizes, cut_share
from latent_diffusion.runtime import parallel

# Height and width of pictures, and how many of a hundred have them: photos of cameras and phones
# in both directions, screens, squares, and pictures of the web.
MIX = {
    (3000, 4000): 16, (4000, 3000): 8, (2000, 3000): 12, (3000, 2000): 6, (1080, 1920): 10,
    (1920, 1080): 5, (1000, 1000): 14, (1350, 1080): 4, (1080, 1350): 1, (1024, 1280): 3,
    (630, 1200): 3, (427, 640): 4, (375, 500): 4, (500, 333): 2, (1080, 2160): 2,
    (1080, 2560): 1, (768, 1366): 1, (720, 1000): 2, (1000, 707): 2,
}  # fmt: skip
SHAPES = {(20, 31): 9, (31, 20): 6, (16, 16): 11, (10, 40): 3}  # of the pictures below


def config(**changes):
    c = default.data()
    c.update({"image_size": 16, "bucket_step": 4, "sizes": True, **changes})
    return c


def pictures(shapes=SHAPES):
    """Each picture has its number as its class, and says by its pixels where they lie."""
    images = []
    for (height, width), count in shapes.items():
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        images += [np.stack([rows, columns, 0 * rows], -1)] * count
    order = np.random.default_rng(0).permutation(len(images))
    return data.ArraySource({"image": [images[i] for i in order], "class_label": range(len(order))})


def batches(source, begin, count, index=0, processes=1, **fields):
    c = config(**fields)
    iterator = data.iterate(
        data.Bucketed(source, c, 4, seed=0),
        data.make_transform(c, train=True),
        **{"batch_size": 4, "seed": 0, "start_step": begin, "shuffle": False, "repeat": False},
        **{"process_index": index, "process_count": processes},
    )
    return [next(iterator) for _ in range(count)]


def test_a_bucket_of_exactly_one_batch_is_trained_on():
    source = pictures({(16, 16): 4, (20, 31): 3})
    assert data.Bucketed(source, config(), 4, seed=0).batches_per_epoch == 1
    assert sorted(set(batches(source, 0, 2)[1]["image"].shape)) == [3, 4, 16]


@pytest.mark.parametrize(("side", "step"), [(512, 64), (768, 64), (1024, 64), (64, 8)])
def test_little_of_a_realistic_mix_is_cut_away(side, step):
    sizes = bucket_sizes(side, step)
    assert (side, side) in sizes and len(sizes) <= 50
    for height, width in sizes:
        assert height % step == width % step == 0 and side // 2 <= min(height, width)
        assert (side - step) ** 2 < height * width <= side**2 and (width, height) in sizes
    shapes, counts = np.array(list(MIX)), np.array(list(MIX.values()))
    shares = cut_share(shapes, np.array(sizes)[assign(shapes, sizes)])
    assert counts.sum() == 100 and (shares * counts).sum() / 100 <= 0.03 and shares.max() <= 0.08
    assert (cut_share(shapes, (1, 1)) * counts).sum() / 100 > 0.25  # of squares


def test_a_picture_belongs_to_the_bucket_that_cuts_least():
    sizes = bucket_sizes(64, 8)
    shapes = np.random.default_rng(0).integers(1, 500, (200, 2))
    for shape, bucket in zip(shapes, assign(shapes, sizes), strict=True):
        least = min(cut_share(shape, size) for size in sizes)
        assert cut_share(shape, sizes[bucket]) == pytest.approx(least)
    assert [sizes[i] for i in assign(np.array(sizes), sizes)] == sizes
    assert cut_share((100, 200), (10, 10)) == 0.5 and cut_share((40, 10), (10, 10)) == 0.75


def test_every_batch_has_pictures_of_one_bucket():
    """An epoch has as many whole batches as it can, whose pictures are all different."""
    source = pictures()
    seen = batches(source, 0, 10)
    for epoch in (seen[:5], seen[5:]):
        labels = np.concatenate([batch["class_label"] for batch in epoch])
        assert len(set(labels)) == 20
        count = {(16, 16): 2, (12, 20): 2, (20, 12): 1}
        assert {s: sum(b["image"].shape[1:3] == s for b in epoch) for s in count} == count
    for batch in seen:
        for image, label, corner, original, target in zip(
            *(batch[k] for k in ("image", "class_label", "crop_top_left")),
            *(batch[k] for k in ("original_size", "target_size")),
            strict=True,
        ):
            height, width = source[int(label)]["image"].shape[:2]
            assert tuple(original) == (height, width) and tuple(target) == image.shape[:2]
            # The middle of the picture shows the middle of the picture.
            middle = (image.mean((0, 1))[:2] + 1) * 127.5
            np.testing.assert_allclose(middle, ((height - 1) / 2, (width - 1) / 2), atol=0.6)
            cut = max(height / target[0], width / target[1]) / min(
                height / target[0], width / target[1]
            )
            assert min(corner) == 0 and max(corner) <= max(target) * (cut - 1) / 2 + 1


def test_every_epoch_leaves_out_other_pictures_and_has_its_order():
    def seen(seed):
        bucketed = data.Bucketed(pictures(), config(), 4, seed=seed)
        steps = [[bucketed[4 * s + i] for i in range(4)] for s in range(40)]
        labels = [[example["class_label"] for example in batch] for batch in steps]
        return labels, [batch[0]["size"] for batch in steps]

    labels, sizes = seen(0)
    trained = np.unique([label for batch in labels for label in batch])
    assert len(trained) == 26  # all but the three wide ones
    epochs = [sizes[i : i + 5] for i in range(0, 40, 5)]
    assert any(sum(a != b for a, b in itertools.pairwise(epoch)) > 2 for epoch in epochs)
    assert seen(1)[0] != labels == seen(0)[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_goes_on_anywhere_with_the_same_batches(processes):
    whole = batches(pictures(), 0, 12, crop="random", flip=True)
    parts = [
        batches(pictures(), 3, 9, p, processes, crop="random", flip=True) for p in range(processes)
    ]
    for step, want in enumerate(whole[3:]):
        for key in want:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, want[key])
    labels = [np.concatenate([b["class_label"] for b in part]) for part in (whole[:5], whole[5:10])]
    assert (labels[0] != labels[1]).any()


def test_a_bucket_with_fewer_pictures_than_a_batch_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        data.Bucketed(pictures(), config(), 4, seed=0)
    (record,) = caplog.records
    assert record.message == (
        "1 of 4 buckets have fewer pictures than a batch (4), so 3 of 29 pictures aren't trained "
        "on, e.g. 3 of 32×8 pixels"
    )
    with pytest.raises(
        ValueError, match=r"fewer pictures .* e\.g\. .*: set batch_size to 11 or less"
    ):
        data.Bucketed(pictures(), config(), 12, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bucket_step": 5}, "data.bucket_step=5 must divide data.image_size=16 at least twice"),
        ({"bucket_step": 16}, "data.bucket_step=16 must divide data.image_size=16 at least twice"),
        ({"crop": "none"}, "it needs another data.crop than 'none'"),
        ({"shorter_side": 20}, "data.shorter_side=0"),
        ({"mask": "boxes"}, "data.mask=''"),
        ({"balance": 0.5}, "data.balance=0"),
    ],
)
def test_fields_for_squares_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data.Bucketed(pictures(), config(**fields), 4, seed=0)


@pytest.mark.parametrize("mode", ["single", "pmap", "mesh"])
def test_a_step_has_one_program_for_each_bucket(mode):
    traced = []

    def step(state, constants, batch, rng, *, axis_name=None):
        traced.append(batch["image"].shape[1:3])
        mean = jnp.mean(batch["image"])
        return state + 1, {"mean": jax.lax.pmean(mean, axis_name) if axis_name else mean}

    mesh = parallel.make_mesh() if mode == "mesh" else None
    run, state = parallel.compile_step(step, mode, mesh=mesh), jnp.zeros(())
    c = config()
    iterator = data.iterate(
        data.Bucketed(pictures({s: 2 * n for s, n in SHAPES.items()}), c, 8, seed=0),
        data.make_transform(c, train=True),
        **{"batch_size": 8, "seed": 0, "shuffle": False, "repeat": False},
    )
    for _ in range(8):
        batch = next(iterator)
        state, metrics = run(state, {}, batch, jax.random.key(0))
        np.testing.assert_allclose(metrics["mean"], batch["image"].mean(), rtol=1e-5)
    assert sorted(traced) == [(12, 20), (16, 16), (20, 12)] and state == 8
