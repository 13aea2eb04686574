"""Scores against closed forms, and against themselves under other batches; bad input is named."""

import errno
import json
import os
import re
import shutil
import struct
import zlib
from types import SimpleNamespace
from unittest.mock import Mock

import answers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several
from conftest import ROOT
from flax.traverse_util import flatten_dict
from PIL import Image

import latent_diffusion as ldm
from configs import default
from latent_diffusion import data
from latent_diffusion.convert.clip import Clip
from latent_diffusion.evaluate import command, features, generate, inception, scores
from latent_diffusion.evaluate.__main__ import evaluate
from latent_diffusion.evaluate.clip_score import measure_clip_score
from latent_diffusion.evaluate.collect import collect
from latent_diffusion.evaluate.features import FeatureNet, levels_of, make_features, with_clip
from latent_diffusion.evaluate.frechet import (
    Gaussian,
    combined,
    frechet_distance,
    gaussian,
    grouped,
    load_statistics,
    measure_frechet,
    save_statistics,
)
from latent_diffusion.evaluate.generate import of_data
from latent_diffusion.evaluate.images import ImageSet, open_images
from latent_diffusion.evaluate.inception_score import inception_score, measure_inception_score
from latent_diffusion.evaluate.kernel import kernel_distance, measure_kernel
from latent_diffusion.evaluate.measured import mean_of
from latent_diffusion.evaluate.neighbours import measure_density_coverage, measure_precision_recall
from latent_diffusion.evaluate.reconstruction import score_reconstructions
from latent_diffusion.evaluate.resize import FILTERS
from latent_diffusion.nets.losses.perceptual import load_lpips_params
from latent_diffusion.nets.losses.similarity import psnr, ssim
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer

RNG = np.random.default_rng(0)


def write_pictures(folder, num, size=8, start=0):
    folder.mkdir(exist_ok=True)
    for i in range(start, start + num):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.png")


# ---------------------------------------------------------------------------- closed forms


def test_frechet_distance_of_commuting_gaussians():
    # With diagonal covariances the distance is |Δμ|² + Σ (√a − √b)²; a rotation changes nothing.
    rotation, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    a, b, shift = np.array([1.0, 4, 9]), np.array([4.0, 4, 0]), np.array([1.0, -2, 0])
    one = Gaussian(9, rotation @ shift, rotation @ np.diag(a) @ rotation.T)
    other = Gaussian(9, np.zeros(3), rotation @ np.diag(b) @ rotation.T)
    assert frechet_distance(one, other) == pytest.approx(5 + 1 + 0 + 9)
    assert frechet_distance(other, one) == pytest.approx(15)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_gaussians_of_parts_make_that_of_the_whole():
    x = 1e3 + RNG.normal(size=(107, 4)).astype(np.float32)
    for whole in (gaussian(x), combined(grouped(x))):
        np.testing.assert_allclose(whole.mean, x.astype(np.float64).mean(0))
        np.testing.assert_allclose(whole.covariance, np.cov(x.astype(np.float64), rowvar=False))


def test_the_jackknife_knows_how_much_a_mean_moves():
    # One feature of variance 1 around μ against N(0, 1): d² ≈ mean², whose error is 2 μ σ / √N.
    x = 3 + RNG.normal(size=(4000, 1))
    measured = measure_frechet(x, Gaussian(0, np.zeros(1), np.eye(1)), "fd")
    assert measured.value == pytest.approx(9, abs=4 * 6 / 4000**0.5)
    assert 0.5 < measured.error / (6 / 4000**0.5) < 2


def test_statistics_files_of_everybody(tmp_path):
    g = gaussian(RNG.normal(size=(50, 3)))
    save_statistics(tmp_path / "a.npz", g)
    loaded = load_statistics(tmp_path / "a.npz")
    assert loaded.count == 50 and frechet_distance(g, loaded) == pytest.approx(0, abs=1e-12)
    adm = {"mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "b.npz", mu=g.mean, sigma=g.covariance, **adm)
    assert load_statistics(tmp_path / "b.npz").count == 0


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2), "count": 9}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mu": np.full(2, np.nan)}, "mu has numbers that are not finite"),
        ({"sigma": np.diag([1, np.inf])}, "sigma has numbers that are not finite"),
        ({"mu": np.array(["a", "b"])}, "mu is <U1, expected real numbers"),
        ({"sigma": np.eye(2) * 1j}, "sigma is complex128, expected real numbers"),
        ({"mu": np.zeros((1, 2))}, "expected [D] and [D D]"),
        ({"sigma": np.eye(3)}, "expected [D] and [D D]"),
        ({"sigma": -np.eye(2)}, "sigma is no covariance"),
        ({"sigma": np.triu(np.ones((2, 2)))}, "sigma is no covariance"),
        ({"count": np.nan}, "count is float64 (), expected an integer"),
        ({"count": np.arange(2)}, "count is int64 (2,), expected an integer"),
        ({"mu": np.array([None, None], object)}, "Object arrays cannot be loaded"),
    ],
)
def test_statistics_that_are_none_are_refused_by_name(changed, message, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **{**GOOD, **changed})
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        load_statistics(path)


def test_statistics_of_another_kind_of_file_are_refused_by_name(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=GOOD["mu"])
    with pytest.raises(ValueError, match="it holds no statistics: no mu and sigma"):
        load_statistics(path)
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    damaged = whole[:100] + b"x" + whole[101:]
    np.save(tmp_path / "a.npy", GOOD["mu"])
    alone = (tmp_path / "a.npy").read_bytes()
    write_pictures(tmp_path / "pictures", 24)
    options = {"samples": str(tmp_path / "pictures"), "features": "alexnet", "metrics": ["fd"]}
    for content in (b"", b"no", whole[: len(whole) // 2], damaged, alone):
        path.write_bytes(content)
        for read in (
            load_statistics, open_images, lambda path: evaluate(**options, reference=path)
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{re.escape(str(path))}"):
                read(str(path))


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    def pairs(z):
        return np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    expected = pairs(x) + pairs(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert float(kernel_distance(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(
        expected, rel=1e-5
    )


def test_kernel_distance_is_zero_on_average_for_equal_distributions():
    x, y = RNG.normal(size=(2, 600, 4))
    same = measure_kernel(x, y, "kd", subsets=24, size=100)
    assert abs(same.value) < 3 * same.error / 24**0.5 + 0.02

    def squared_mmd(x, y):
        within = [np.sum((z @ z.T / 4 + 1) ** 3 * (1 - np.eye(100))) / 9900 for z in (x, y)]
        return sum(within) - 2 * np.mean((x @ y.T / 4 + 1) ** 3)

    draws = [squared_mmd(*(RNG.permutation(z)[:100] for z in (x, y))) for _ in range(50)]
    assert same.error == pytest.approx(np.std(draws), rel=0.5)  # of a subset, not of the mean
    assert measure_kernel(x + 1, y, "kd", subsets=8, size=100).value > 1


def test_inception_score_lies_between_one_and_the_number_of_classes():
    sure = 100 * np.eye(4)[np.arange(40) % 4]
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(np.zeros((40, 4))) == pytest.approx(1)
    assert inception_score(sure + RNG.normal(size=(40, 1))) == pytest.approx(4)  # shifts cancel
    assert measure_inception_score(np.zeros((40, 4))).error == pytest.approx(0)
    by_class = sure[np.argsort(np.arange(40) % 4)]
    assert measure_inception_score(by_class).value > 1.5  # parts are drawn at random


def test_precision_and_recall_of_constructed_manifolds():
    line = np.linspace(0, 1, 40)[:, None] * np.ones((1, 2))
    half, far = line[:20], line[:20] + np.array([5, -5])
    both = np.concatenate([half, far])
    equal = measure_precision_recall(line, line)
    assert (equal["precision"].value, equal["recall"].value) == (1, 1)
    narrow = measure_precision_recall(half, line)
    assert narrow["precision"].value == 1 and 0.5 <= narrow["recall"].value < 0.65
    wrong = measure_precision_recall(both, line)
    assert wrong["precision"].value == 0.5
    assert measure_density_coverage(far, line)["coverage"].value == 0
    same = measure_density_coverage(line, line)
    assert same["coverage"].value == 1 and same["density"].value == pytest.approx(1, abs=0.25)
    moved = measure_precision_recall(both + 3000, line + 3000)  # as ReLU's features are
    assert moved["precision"].value == pytest.approx(0.5, abs=0.05)


def test_neighbours_agree_with_all_distances_beyond_one_block(monkeypatch):
    from latent_diffusion.evaluate import neighbours

    x, y = RNG.normal(size=(50, 3)), RNG.normal(size=(70, 3))
    x[0] = 0  # here lies the padding of the last block, which is nobody's neighbour
    monkeypatch.setattr(neighbours, "COLUMNS", 32)
    monkeypatch.setattr(neighbours, "ROWS", 16)
    squared = np.square(x[:, None] - y).sum(-1)
    found = neighbours.nearest(x, y, 4, np.zeros(3, np.float32))
    np.testing.assert_allclose(found, np.sort(squared, 1)[:, :4], rtol=1e-4, atol=1e-5)
    radius = np.full(70, 1.5, np.float32)
    counts = neighbours.balls_around(x, y, radius, np.zeros(3, np.float32))
    np.testing.assert_array_equal(counts, (squared <= 1.5).sum(1))


def test_psnr_and_ssim_of_known_pairs():
    x = jnp.asarray(RNG.uniform(-0.5, 0.5, (2, 16, 16, 3)), jnp.float32)
    np.testing.assert_allclose(psnr(x, x + 0.2), 20, rtol=1e-4)  # 10 log10(4 / 0.04)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-5)
    flat = jnp.full((1, 12, 12, 1), 0.5)
    c = 0.02**2
    expected = (2 * 0.5 * 0.25 + c) / (0.5**2 + 0.25**2 + c)  # only luminance differs
    np.testing.assert_allclose(ssim(flat, flat / 2), expected, rtol=1e-3)
    with pytest.raises(ValueError, match="SSIM needs 11 pixels a side, got 8x8"):
        ssim(x[:, :8, :8], x[:, :8, :8])


def test_a_classifiers_features_are_its_last_layer_over_standardised_pictures(monkeypatch):
    seen = []

    def net(layer):
        return lambda: SimpleNamespace(apply=lambda _, x: seen.append(x) or [0 * x, layer * x])

    monkeypatch.setattr(features, "load_lpips_params", lambda *_: {"net": {}})
    for name, key, layer in (("alexnet", "alex", 1), ("vgg16", "vgg", 2)):
        monkeypatch.setitem(features.NETS, key, net(layer))
        grey = jnp.full((2, 8, 8, 3), 127.5)
        out = make_features(name).apply({}, grey)["features"]
        expected = layer * np.array([0.030 / 0.458, 0.088 / 0.448, 0.188 / 0.450])
        np.testing.assert_allclose(out, np.tile(expected, (2, 1)), rtol=1e-4)
        two = jnp.array([0.0, 255]).reshape(1, 1, 2, 1) * jnp.ones((1, 2, 1, 3))
        make_features(name, filter="tensorflow").apply({}, two)
        # By this filter the first half goes from one pixel to the other, and the second is flat.
        red = 0.458 * np.asarray(seen[-1])[0, 0, :, 0] - 0.030
        assert red.shape == (224,)
        np.testing.assert_allclose(red[[0, 56, 112, 223]], [-1, 0, 1, 1], atol=1e-5)


def test_clip_score_is_a_clipped_cosine():
    a = np.array([[2.0, 0], [0, 3], [1, 1]])
    b = np.array([[5.0, 0], [0, -1], [1, 0]])
    assert measure_clip_score(a, b).value == pytest.approx(100 * (1 + 0 + 0.5**0.5) / 3)


@pytest.mark.parametrize("filter", FILTERS)
def test_resizing_keeps_constants_and_its_own_size(filter):
    for old, new in ((7, 19), (19, 7), (8, 8)):
        np.testing.assert_allclose(FILTERS[filter](old, new).sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(FILTERS[filter](8, 8), np.eye(8), atol=1e-12)


# ---------------------------------------------------------------------------- streaming


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    """A write to mapped memory for which the disk has no room kills the process."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    def step(state, constants, batch, rng, *, axis_name=None):
        return {"double": 2 * batch["image"]}

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        collect(step, {}, lambda start, stop: np.zeros((stop - start, 2), np.float32), 8, tmp_path)


def test_collecting_does_not_depend_on_batches_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from latent_diffusion.evaluate import collect as module

    monkeypatch.setattr(module, "CHUNK", 10)
    x = RNG.normal(size=(37, 2)).astype(np.float32)
    read = []

    def chunk(start, stop):
        read.append(start)
        if len(read) == 3:
            raise KeyboardInterrupt
        return x[start:stop]

    rows = set()

    def step(state, constants, batch, rng, *, axis_name=None):
        rows.add(len(batch["image"]))
        return {"double": 2 * batch["image"], "sum": batch["image"].sum(1) + constants}

    with pytest.raises(KeyboardInterrupt):
        collect(step, jnp.ones(()), chunk, 37, tmp_path / "a", 8)
    arrays = collect(step, jnp.ones(()), chunk, 37, tmp_path / "a", 8)
    assert read == [0, 10, 20, 20, 30]
    other = collect(step, jnp.ones(()), lambda a, b: x[a:b], 37, tmp_path / "b", 3)
    for name in ("double", "sum"):
        np.testing.assert_array_equal(arrays[name], other[name])
    np.testing.assert_allclose(arrays["sum"], x.sum(1) + 1, rtol=1e-6)
    assert rows == {1}
    collect(step, jnp.ones(()), lambda a, b: x[a:b], 37, tmp_path / "c", 4096)
    assert rows == {1, 2}  # no device has more than its share of a chunk


# ---------------------------------------------------------------------------- names and bad input


def test_results_bear_the_name_of_their_features():
    x, y = RNG.normal(size=(2, 60, 3))
    reference = scores.Reference(features=y)
    arrays = {"features": x, "logits": x}
    ours = scores.score(["fd", "kd", "pr", "dc"], arrays, reference, "alexnet")
    assert list(ours) == [
        *("fd_alexnet", "kd_alexnet", "precision_alexnet", "recall_alexnet"),
        *("density_alexnet", "coverage_alexnet"),
    ]
    squared = {(a, b): np.square(p[:, None] - q).sum(-1) for a, p in (("x", x), ("y", y))
               for b, q in (("x", x), ("y", y))}  # fmt: skip
    balls = {(a, k): np.sort(squared[a, a], 1)[:, k] for a in "xy" for k in (3, 5)}
    inside = squared["x", "y"] <= balls["y", 5]
    found = {name.removesuffix("_alexnet"): result.value for name, result in ours.items()}
    assert found["precision"] == np.mean((squared["x", "y"] <= balls["y", 3]).any(1))
    assert found["recall"] == np.mean((squared["y", "x"] <= balls["x", 3]).any(1))
    assert found["density"] == pytest.approx(inside.sum(1).mean() / 5)
    assert found["coverage"] == inside.any(0).mean()
    theirs = scores.score(["fid", "kid", "is", "pr"], arrays, reference, "inception")
    assert list(theirs) == ["fid", "kid", "inception_score", "precision", "recall"]
    fewer = scores.Reference(features=y[:30])
    for metric in ("kid", "is"):  # of random parts
        drawn = [
            [*scores.score([metric], arrays, fewer, "inception", seed).values()] for seed in (0, 1)
        ]
        assert drawn[0] != drawn[1], metric
    narrow = scores.score(["pr"], {"features": 0.1 * x}, reference, "inception")
    assert narrow["recall"].value < 0.5 < narrow["precision"].value
    assert theirs["fid"].value == pytest.approx(frechet_distance(gaussian(x), gaussian(y)))
    with pytest.raises(ValueError, match="fid means Inception features, not 'alexnet'; fd is"):
        scores.check_metrics(["fid"], "alexnet")
    with pytest.raises(ValueError, match="unknown metric 'fit'; known: clip, dc, fd"):
        scores.check_metrics(["fit"], "inception")
    with pytest.raises(ValueError, match="pr needs reference images"):
        scores.score(["pr"], arrays, scores.Reference(statistics=gaussian(y)), "inception")
    with pytest.raises(ValueError, match="fid needs at least 20 images, got 7"):
        scores.check_counts(["pr", "fid"], 7)
    with pytest.raises(ValueError, match="fid needs at least 20 images, got 7"):
        scores.score(["fid"], {"features": x[:7]}, reference, "inception")


@pytest.mark.parametrize("metric", sorted(scores.MINIMUM))
def test_too_few_images_are_said_before_the_work_as_a_metric_would_say_it(metric):
    draw, few = np.random.default_rng(0).normal, scores.MINIMUM[metric] - 1
    keys = ("features", "logits", "clip", "captions")
    arrays = {key: draw(size=(few, 4)).astype(np.float32) for key in keys}
    reference = scores.Reference(draw(size=(30, 4)).astype(np.float32))
    with pytest.raises(ValueError) as early:
        scores.check_counts([metric], few)
    with pytest.raises(ValueError) as late:
        scores.score([metric], arrays, reference, "inception")
    said = [str(error.value).partition(" needs ")[2] for error in (early, late)]
    assert said[0] == said[1] == f"at least {few + 1} images, got {few}"
    scores.check_counts([metric], few + 1)


def test_inception_has_the_published_size_and_says_where_its_weights_come_from(tmp_path):
    leaves = inception._leaves()
    # torchvision counts 21,785,568 before the classifier, with a scale and a shift for each of
    # 17,216 channels; folded, the scales are gone.
    expected = 21_785_568 - 17_216 + 2048 * 1008
    assert sum(np.prod(shape) for shape in leaves.values()) == expected
    with pytest.raises(ValueError, match=r"no Inception weights.* --features_path=.*pytorch-fid"):
        make_features("inception", tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="unknown features 'dino'; known: alexnet, incep"):
        make_features("dino")


def test_reconstructions_are_held_against_their_pictures():
    x, y = RNG.normal(size=(2, 40, 3))
    arrays = {"features": x, "features_rec": y, "lpips": np.array([1.0, 3.0])}
    found = score_reconstructions(arrays, "vgg", "inception")
    assert list(found) == ["lpips_vgg", "rfid"] and found["lpips_vgg"].value == 2
    assert found["rfid"].value == pytest.approx(frechet_distance(gaussian(y), gaussian(x)))
    assert [*score_reconstructions(arrays, "alex", "vgg16")] == ["lpips_alex", "rfd_vgg16"]


def test_folders_with_something_wrong_are_named(tmp_path):
    write_pictures(tmp_path / "good", 3)
    (tmp_path / "good" / "grid.png").write_bytes(b"no sample")
    assert open_images(str(tmp_path / "good")).count == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"neither a folder, an \.npz file nor tfds:NAME"):
        open_images(str(tmp_path / "nothing"))
    write_pictures(tmp_path / "mixed", 2)
    write_pictures(tmp_path / "mixed", 1, size=9, start=2)
    with pytest.raises(ValueError, match=r"mixed image sizes .*00000.png is 8×8, 00002.png is 9×9"):
        open_images(str(tmp_path / "mixed"))
    assert open_images(str(tmp_path / "mixed"), 4).read(0, 3).shape == (3, 4, 4, 3)
    write_pictures(tmp_path / "huge", 1)  # whose header claims 30,000² pixels
    data = bytearray((tmp_path / "huge" / "00000.png").read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "huge" / "00000.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"1 of 1 images in .*huge can't be read: 00000.png"):
        open_images(str(tmp_path / "huge"))
    write_pictures(tmp_path / "bad", 3)
    whole = (tmp_path / "bad" / "00001.png").read_bytes()
    (tmp_path / "bad" / "00001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 3 images in .*bad can't be read: 00001.png"):
        open_images(str(tmp_path / "bad")).read(0, 3)
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200  # the middle square
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide" / "0.png")
    np.testing.assert_array_equal(
        open_images(str(tmp_path / "wide"), 4).read(0, 1), wide[None, :, 4:8]
    )
    np.savez(tmp_path / "wide.npz", wide[None])
    np.testing.assert_array_equal(
        open_images(str(tmp_path / "wide.npz"), 4).read(0, 1), wide[None, :, 4:8]
    )
    (tmp_path / "many").mkdir()
    for number in (99999, 100000, 7):  # as sample.py names them
        level = np.full((1, 1, 3), number % 256, np.uint8)
        Image.fromarray(level).save(tmp_path / "many" / f"{number:05d}.png")
    read = open_images(str(tmp_path / "many")).read(0, 3)
    assert read[:, 0, 0, 0].tolist() == [7, 99999 % 256, 100000 % 256]
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="arr_0 must be uint8"):
        open_images(str(tmp_path / "floats.npz"))


def test_an_evaluation_is_remembered_for_the_same_work_alone(tmp_path, monkeypatch):
    """Another guidance or seed makes other samples, another metric needs other features."""
    config = several.make_config(**{"data.image_size": answers.SIDE})
    workdir.save_config(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    pictures = RNG.integers(0, 256, (24, answers.SIDE, answers.SIDE, 3)).astype(np.uint8)
    source = data.ArraySource({"image": pictures, "caption": ["red cat", "blue dog"] * 12})
    monkeypatch.setattr(data, "make_source", lambda config, split: source)
    made = [answers.model(answers.TEXT, gain=0.5)]
    monkeypatch.setattr(command, "load", lambda path: made[0])
    net = FeatureNet("alexnet", {}, lambda params, levels: {"features": levels.mean((1, 2))})
    monkeypatch.setattr(command, "make_features", lambda *given: net)
    colours = Mock(
        spec=Clip,
        params={},
        of_images=lambda params, images: images.mean((1, 2)),
        embed_texts=lambda texts: np.ones((len(texts), 3)),
    )
    monkeypatch.setattr(command, "load_clip", lambda path: colours)

    def record(*metrics, **options):
        options |= {"features": "alexnet", "num_images": 24, "clip_path": "there"}
        return evaluate(workdir=str(tmp_path), metrics=list(metrics), **options)

    def score(*metrics, scale=1.0, seed=0):
        return record(*metrics, guidance_scale=scale, seed=seed)["metrics"]

    with pytest.raises(ValueError, match="rfid means Inception features, not 'alexnet'; rfd is"):
        record("rfid")
    first = score("fd")
    assert score("fd", scale=3.0) != first == score("fd")
    assert score("fd", seed=1) != first
    kept = {"save_images": str(tmp_path / "kept"), "guidance_scale": 1.0, "seed": 0}
    assert record("fd", **kept)["metrics"] == first  # known, but its pictures are still to be kept
    assert len(list((tmp_path / "kept").glob("*.png"))) == 24
    shutil.rmtree(tmp_path / "kept")
    assert record("fd", **kept)["metrics"] == first  # they are drawn again
    assert len(list((tmp_path / "kept").glob("*.png"))) == 24
    alone = score("clip")
    assert score("fd", "clip") == pytest.approx({**first, **alone})
    assert record("fd")["reference"] == "synthetic@train"
    assert record("psnr")["images"] == "synthetic@test"  # of the first stage
    for name in ("num_steps", "reference", "save_images", "save_reference"):
        with pytest.raises(ValueError, match=f"--{name}=3 has no effect on reconstructions: leave"):
            record("psnr", **{name: 3})
    for metric, given, what in (
        ("clip", {"split": "test"}, "metrics=clip, which need no reference"),
        ("fd", {"split": "test", "reference": "there"}, "--reference, which is another one"),
        ("fd", {"image_size": 8}, "a workdir's own pictures"),
        ("psnr", {"image_size": 8}, "a workdir's own pictures"),
    ):
        with pytest.raises(ValueError, match=f"=(test|8) has no effect on {what}: leave it out"):
            record(metric, **given)
    with pytest.raises(ValueError, match="metrics=fd,psnr mixes reconstructions and samples"):
        record("fd", "psnr")

    def asked(net, path=None):
        raise ValueError(f"LPIPS of {path}")

    monkeypatch.setattr(command, "load_lpips_params", asked)
    for metrics, path in ((["lpips"], "here"), (["lpips", "rfd"], None)):
        with pytest.raises(ValueError, match=f"LPIPS of {path}"):
            record(*metrics, features_path="here")
    usual = record("fd")["metrics"]
    made[0] = made[0].replace(defaults={**made[0].defaults, "guidance_scale": 3.0})
    by_config = record("fd")["metrics"]
    assert by_config != usual  # without a flag
    made[0] = answers.model(answers.TEXT, gain=0.1)
    made[0] = made[0].replace(defaults={**made[0].defaults, "guidance_scale": 3.0})
    assert record("fd")["metrics"] == by_config  # still remembered
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:  # of step 0, as before
        checkpoints.save(0, {"ema_params": {"gain": jnp.full((), 0.1)}})
    last = record("fd", seed=3)
    assert last["metrics"] != by_config  # of other parameters
    noted = {"seed": 3, "filter": "bicubic", "step": 0, "num_images": 24, "images": "samples"}
    assert noted.items() <= last.items() and "guidance_scale" not in last
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["guidance_scale"] == 1.0 and json.loads(lines[-1]) == last

    source.arrays["caption"] = ["red cat", "blue dog", "green cat"] * 8
    others = record("fd", seed=3)
    assert others["metrics"] != last["metrics"]  # of other prompts
    config.init_from = "base"  # which a LoRA's checkpoint doesn't hold
    workdir.save_config(config, tmp_path)
    assert record("fd", seed=3)["metrics"] == others["metrics"]
    made[0] = answers.model(answers.TEXT, gain=0.9).replace(defaults=made[0].defaults)
    assert record("fd", seed=3)["metrics"] != others["metrics"]

    def while_a_run_goes_on(path):
        with Checkpointer(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(1, {"ema_params": {"gain": jnp.full((), 0.2)}})
        return made[0]

    monkeypatch.setattr(command, "load", while_a_run_goes_on)
    with pytest.raises(ValueError, match="got a checkpoint of step 1 while its model was read"):
        record("fd")


def test_collected_arrays_belong_to_their_pictures_and_options(tmp_path, monkeypatch):
    """In a folder of their own, whichever the working directory is."""
    asked = {"workdir": "w", "weights": "1", "features": "vgg16", "features_path": "/a"}
    asked |= {"filter": "bicubic", "image_size": 8, "metrics": ["psnr"], "lpips": "alex"}
    asked |= {"clip_path": None, "seed": 0, "save_images": None, "defaults": {}, "batch_size": 8}
    asked |= {"sampler": None, "num_steps": None, "guidance_scale": None, "samples": None}
    given = []

    def folder(kind="reconstructions", images=None, count=5, **options):
        command._collected(
            {**asked, **options}, tmp_path, kind, images or ImageSet("x", 9, None), count,
            lambda *_, directory, **__: given.append(directory),
        )  # fmt: skip
        return given[-1]

    first = folder()
    monkeypatch.chdir(tmp_path)
    here = folder(features_path="a")
    assert first == folder(batch_size=3) and here == folder(features_path=str(tmp_path / "a"))
    others = [here, folder("reference"), folder(images=ImageSet("y", 9, None)), folder(count=6)]
    changed = {"features": "alexnet", "filter": "bilinear", "features_path": "b", "image_size": 9}
    changed |= {"lpips": "vgg", "metrics": ["psnr", "ssim"], "weights": "2"}
    others += [folder(**{name: value}) for name, value in changed.items()]
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        write_pictures(tmp_path / place / "real", 2, start=7)
        monkeypatch.chdir(tmp_path / place)
        others.append(folder(images=open_images("real")))
    assert folder(images=open_images("real")) == others[-1]
    Image.new("RGB", (8, 8)).save("real/00008.png")
    np.savez("real.npz", np.zeros((2, 4, 4, 3), np.uint8))
    others += [folder(images=open_images(name)) for name in ("real", "real.npz")]
    np.savez("real.npz", np.ones((2, 4, 4, 3), np.uint8))
    os.utime("real.npz", (1, 1))
    others.append(folder(images=open_images("real.npz")))
    assert len({first, *others}) == len(others) + 1


def test_samples_of_changed_data_are_made_anew(tmp_path):
    """Adding a picture changes the order of all."""
    write_pictures(tmp_path, 3)
    source = data.ArraySource({"caption": ["a", "b", "c"]})
    source.paths = sorted(tmp_path.iterdir())
    source.annotations = [{"class_label": i} for i in range(3)]
    versions = []

    def note(count=2, order=(0, 1, 2), **names):
        made = {name: generate.Rows(np.array(order), read) for name, read in names.items()}
        versions.append(generate.version_of_conditions(made, source, count))
        return versions[-1]

    prompts = {"prompts": "abc".__getitem__}
    of_text, of_class = note(**prompts), note(class_labels=int)
    note()
    note(**prompts, order=(1, 0, 2))
    note(**prompts, count=3)
    os.utime(source.paths[1], (1, 1))
    note(class_labels=int)
    source.annotations[2]["class_label"] = 0
    note(class_labels=int)
    (tmp_path / "map.png").touch()
    source.annotations[1]["segmentation"] = tmp_path / "map.png"
    note(segmentation=int)
    os.utime(tmp_path / "map.png", (1, 1))
    note(segmentation=int)
    assert len({*versions}) == len(versions) == 9
    assert note(**prompts) == of_text and note(segmentation=int) == versions[8] != of_class


@pytest.mark.parametrize("task", ["autoencoding", "denoising"])
def test_without_metrics_a_workdir_is_scored_as_the_page_says(task, tmp_path, monkeypatch):
    config = several.make_config(task=task)
    workdir.save_config(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("_score_first_stage", "_score_samples"):
        monkeypatch.setattr(
            command, name, lambda options, *_, name=name: {name: options["metrics"]}
        )
    record = evaluate(workdir=str(tmp_path))
    page = (ROOT / "docs" / "evaluation.md").read_text()
    metrics = record["_score_first_stage" if task == "autoencoding" else "_score_samples"]
    assert f"| `{','.join(metrics)}` |" in page and len(metrics) == 2 + (task == "autoencoding")


def test_a_converted_model_has_no_data_to_be_scored_with(tmp_path):
    ldm.Model(first_stage=answers.first_stage(), image_size=4).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model is a converted model without data: write its sam"):
        evaluate(workdir=str(tmp_path / "model"))


def test_samples_are_as_many_as_the_page_says_under_conditions_of_the_test_split(monkeypatch):
    source, splits = data.ArraySource({"caption": ["a", "b", "c"]}), []
    model = answers.model(answers.TEXT)
    monkeypatch.setattr(command, "_load", lambda options: model)
    monkeypatch.setattr(data, "make_source", lambda config, split: splits.append(split) or source)
    options = {"seed": 0, "num_images": 0, "batch_size": 8, "save_images": None, "split": "train"}
    options |= {"sampler": "heun", "num_steps": 7, "guidance_scale": None}
    images, _ = command._samples_of_model(options, several.make_config())
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert splits == ["test"] and f"(by default {images.count:,}), under the conditions" in page
    assert images.count == 50_000 and len(images.captions(7)) == 7


def test_samples_of_every_chunk_are_new_and_have_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 2)

    def sample(rng, num_images, batch_size, **conditions):
        return jax.random.uniform(rng, (num_images, 4, 4, 3), minval=-1)

    made = generate.samples(SimpleNamespace(sample=sample), {}, 4, 0, 64, tmp_path)
    first, second = made.read(0, 2), made.read(2, 4)
    assert (first != second).any()
    large = generate.samples(SimpleNamespace(sample=sample), {}, 4, 2**32, 64)
    assert (large.read(0, 2) != first).any()
    for i, image in enumerate([*first, *second]):
        np.testing.assert_array_equal(Image.open(tmp_path / f"{i:05d}.png"), image)


def test_samples_are_of_captions_in_an_order_that_the_seed_decides():
    def conditions(keys, seed=0, captions=("a", "b", "c", "d", "e")):
        model = SimpleNamespace(conditioner=SimpleNamespace(keys=keys), denoiser=True)
        examples = {"caption": list(captions), "class_label": range(len(captions))}
        return generate.conditions_of(model, data.ArraySource(examples), None, 7, seed)

    prompts = [conditions(("tokens",), seed)["prompts"][0:7] for seed in (0, 1)]
    assert sorted(prompts[0][:5]) == sorted(prompts[1][:5]) == list("abcde")
    assert prompts[0] != prompts[1]
    both = conditions(("tokens", "class_label"))  # of the same examples
    assert ["abcde"[i] for i in both["class_labels"][0:7]] == both["prompts"][0:7] == prompts[0]
    with pytest.raises(ValueError, match="several captions a picture can't be paired"):
        conditions(("tokens", "class_label"), captions=[["a", "b"], ["c"]])


def test_captions_are_the_first_lines_beside_the_pictures(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    pictures = ImageSet("x", 3, lambda *_: None)
    fewer = ImageSet("x", 2, lambda *_: None)  # one was removed, but which?
    assert command._captions({"samples": str(tmp_path)}, pictures, 2) == ["a", "b"]
    beside = {"samples": str(tmp_path / "samples.npz")}
    assert command._captions(beside, pictures, 3) == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"a caption for each of 2 pictures; .* has 3"):
        command._captions(beside, fewer, 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="with their prompts, but this model takes none"):
        command._captions({"samples": None}, pictures, 3)


def test_nets_see_levels_and_clip_sees_its_range():
    grey = jnp.array([0, 100, 255], jnp.uint8).reshape(1, 1, 3, 1)
    levels = levels_of(grey)
    np.testing.assert_array_equal(levels, np.tile(grey, (1, 1, 1, 3)))
    np.testing.assert_array_equal(levels_of(grey / 127.5 - 1), levels)
    np.testing.assert_array_equal(levels_of(3 * (grey / 127.5 - 1))[0, 0, :, 0], [0, 45, 255])
    seen = []
    clip = Mock(spec=Clip, params={}, of_images=lambda params, x: seen.append(x) or x)
    with_clip(None, clip).apply({"net": {}, "clip": {}}, levels)
    np.testing.assert_allclose(seen[0], levels / 127.5 - 1, atol=1e-6)
    draws = RNG.normal(size=(2000, 50))  # the error of a mean is the spread of such means
    errors = [mean_of(row).error for row in draws]
    np.testing.assert_allclose(np.mean(errors), draws.mean(1).std(), rtol=0.1)


def test_folders_are_scored_by_the_command(tmp_path):
    write_pictures(tmp_path / "a", 24)
    write_pictures(tmp_path / "b", 24, start=100)
    np.savez(tmp_path / "b.npz", open_images(str(tmp_path / "b")).read(0, 24))
    options = {"samples": str(tmp_path / "a"), "features": "alexnet", "metrics": ["fd"]}
    statistics = str(tmp_path / "statistics.npz")
    first = evaluate(**options, reference=str(tmp_path / "b"), save_reference=statistics)
    for reference in (str(tmp_path / "b.npz"), statistics):
        again = evaluate(**options, reference=reference)
        assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-4)
    assert json.loads(json.dumps(first))["num_images"] == 24
    with pytest.raises(ValueError, match=r"num_images=25, but .* has only 24"):
        evaluate(**options, reference=statistics, num_images=25)
    with pytest.raises(ValueError, match="metrics=clip need no --reference: leave it out"):
        asked = {**options, "metrics": ["clip"], "reference": "b", "split": None}
        command._reference(asked, tmp_path, None, None)
    with pytest.raises(ValueError, match="metrics=fd need --reference"):
        evaluate(**options)
    for name, message in (
        ("batch_size", "batch_size=-1 must be at least 1"),
        ("image_size", "image_size=-1 must be at least 0"),
        ("seed", "seed=-1 must be at least 0"),
        ("num_images", "num_images=-1 must be at least 0"),
        ("num_steps", "num_steps=-1 has no effect on --samples, which exist already: leave it"),
        ("split", "split=-1 has no effect on --samples"),
        ("num_image", "unknown option 'num_image'; known: .*num_images"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(**options, reference=statistics, **{name: -1})


def test_a_reference_has_enough_pictures_and_does_not_count(tmp_path, monkeypatch):
    net = FeatureNet("alexnet", {}, lambda params, levels: {"features": levels.mean((1, 2))})
    monkeypatch.setattr(command, "make_features", lambda *given: net)
    for name, count in (("samples", 24), ("many", 40), ("few", 19)):
        write_pictures(tmp_path / name, count)
    options = {"samples": str(tmp_path / "samples"), "features": "alexnet"}
    against = {name: {**options, "reference": str(tmp_path / name)} for name in ("many", "few")}
    assert evaluate(**against["many"], metrics=["pr", "dc"])["num_images"] == 24
    with pytest.raises(ValueError, match="fd needs at least 20 images, got 19"):
        evaluate(**against["few"], metrics=["fd"])
    assert evaluate(**against["few"], metrics=["pr"], num_images=20)["num_images"] == 20


def test_a_score_is_a_number_or_one_line_says_why_not(tmp_path, monkeypatch):
    write_pictures(tmp_path / "a", 24)
    options = {"samples": str(tmp_path / "a"), "features": "alexnet", "metrics": ["fd"]}
    weights = tmp_path / "weights.npz"
    params = flatten_dict(load_lpips_params("alex"), sep="/")
    np.savez(weights, **{**params, "lin0/kernel": np.full((64, 1), np.nan)})
    with pytest.raises(ValueError, match=r"weights\.npz: lin0/kernel has numbers that are not fin"):
        evaluate(**options, reference=str(tmp_path / "a"), features_path=str(weights))

    monkeypatch.setattr(command, "make_features", lambda *given: net)
    kept = tmp_path / "kept.npz"
    write_pictures(tmp_path / "black", 23)
    Image.new("RGB", (8, 8)).save(tmp_path / "black" / "00023.png")
    asked = {"reference": str(tmp_path / "a"), "save_reference": str(kept)}

    def logarithms(params, levels):
        return {"features": jnp.log(levels.mean((1, 2)))}

    net = FeatureNet("alexnet", {}, logarithms)
    with pytest.raises(ValueError, match="features of picture 23 has numbers that are not finite"):
        evaluate(**{**options, "samples": str(tmp_path / "black")}, **asked)
    assert load_statistics(kept).count == 24  # the reference is there before samples are made
    net = FeatureNet("alexnet", {}, lambda params, levels: {"features": levels.mean((1, 2))})
    for name, mean in (("huge", np.full(3, 1e200)), ("other", np.zeros(2))):
        np.savez(tmp_path / f"{name}.npz", mu=mean, sigma=np.eye(len(mean)))
    with pytest.raises(ValueError, match=r"huge\.npz is inf ± nan: their numbers are too large"):
        evaluate(**options, reference=str(tmp_path / "huge.npz"))
    with pytest.raises(ValueError, match=r"other\.npz has statistics of 2 features, but alexnet h"):
        evaluate(**options, reference=str(tmp_path / "other.npz"))

    def scored(params, levels):
        means = levels.mean((1, 2))
        return {"features": means, "logits": means}

    net = FeatureNet("inception", {}, scored)
    options |= {"features": "inception", "metrics": ["is"]}
    assert evaluate(**options)["reference"] == "none"
    kept.unlink()
    evaluate(**options, **asked)
    assert load_statistics(kept).count == 24
    with pytest.raises(ValueError, match="metrics=is need --reference"):
        evaluate(**options, save_reference=str(kept))

    def step(state, constants, batch, rng, *, axis_name=None):
        return {"psnr": jnp.where(batch["image"] == 3, jnp.nan, 1.0)}

    read = np.arange(7, dtype=np.float32)
    with pytest.raises(ValueError, match="psnr of picture 3 has numbers that are not finite"):
        collect(step, {}, lambda start, stop: read[start:stop], 7, tmp_path / "c", 2)


def test_the_pictures_of_a_runs_data_need_no_conditions(tmp_path):
    """Neither boxes for a layout, nor small pictures or holes, which take time."""
    write_pictures(tmp_path, 3)
    config = default.get_config()
    fields = {"name": "image_folder", "dir": str(tmp_path), "test_split": "all", "image_size": 8}
    config.data.update(fields)
    plain = of_data(config, "test").read(0, 3)
    config.data.update({"low_res": "bicubic", "low_res_factor": 3, "mask": "box"})
    config.data.layout.vocab_size = 1024
    np.testing.assert_array_equal(of_data(config, "test").read(0, 3), plain)
