"""Latents that are encoded once: the right ones, once, and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import BATCH, SIZE, make_config

from latent_diffusion import data
from latent_diffusion.convert import frozen_parts
from latent_diffusion.core.rng import init_key
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.training import moments

COUNT = 19  # no multiple of the batch


@pytest.fixture
def made(tmp_path):
    """(config, workdir, first stage, images of the source)."""
    config = make_config("denoising")
    module = make_autoencoder(config.autoencoder.to_dict())
    init = jax.jit(lambda rng: module.init(rng, jnp.zeros((1, SIZE, SIZE, 3)))["params"])
    params = init(init_key(0))
    first_stage = FirstStage(params, jnp.ones(()), jnp.zeros(()), module)
    frozen_parts.save_first_stage(tmp_path, first_stage, "here")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)
    return config, tmp_path, first_stage, images


def source_of(images):
    captions = [f"number {i}" for i in range(len(images))]
    return data.ArraySource({"image": images, "caption": captions, "other": np.arange(len(images))})


def test_every_example_is_encoded_once_and_anew_only_for_other_pictures(made, monkeypatch):
    config, directory, first_stage, images = made
    cached = moments.with_moments(config, directory, first_stage, source_of(images))
    assert len(cached) == COUNT
    assert (
        set(cached[0]) == {"moments", "caption", "window"} and cached[18]["caption"] == "number 18"
    )
    want = jax.jit(first_stage.moments)(images / np.float32(127.5) - 1)
    np.testing.assert_allclose([cached[i]["moments"] for i in range(COUNT)], want, atol=1e-5)
    (file,) = directory.glob("moments-*.npy")

    encode = moments._encoded
    monkeypatch.setattr(moments, "_encoded", None)
    config.data.update({"dir": "where the same pictures lie now", "search": "faiss", "workers": 0})
    config.data.embedding_path = "and their embeddings"
    again = moments.with_moments(config, directory, first_stage, source_of(images))
    np.testing.assert_array_equal(again[3]["moments"], cached[3]["moments"])

    monkeypatch.setattr(moments, "_encoded", encode)
    other = moments.with_moments(config, directory, first_stage, source_of(images[::-1]))
    np.testing.assert_allclose(other[0]["moments"], want[18], atol=1e-5)
    assert [path != file for path in directory.glob("moments-*.npy")] == [True]


def test_what_fails_midway_leaves_nothing_that_passes_for_whole(made, monkeypatch):
    config, directory, first_stage, images = made

    def failing(*args):
        yield np.zeros((8, 4, 4, 4), np.float32)
        raise OSError("disk full")

    monkeypatch.setattr(moments, "_encoded", failing)
    with pytest.raises(OSError, match="disk full"):
        moments.with_moments(config, directory, first_stage, source_of(images))
    assert list(directory.glob("moments-*")) == []


def test_pictures_are_kept_for_conditions_that_are_made_of_them():
    seen = lambda **fields: moments.pictures_are_seen(make_config("denoising", **fields))  # noqa: E731
    assert not seen() and seen(control="edges") and seen(**{"data.low_res": "bicubic"})


@pytest.mark.parametrize(("field", "value"), [("flip", True), ("crop", "random")])
def test_random_pictures_have_no_one_encoding(made, field, value):
    config, *rest, images = made
    config.data[field] = value
    with pytest.raises(ValueError, match=r"first_stage\.cache=True needs data\.flip=False"):
        moments.with_moments(config, *rest, source_of(images))


@pytest.mark.parametrize("low_res", ["", "bicubic"])
def test_conditions_of_cached_examples_are_those_of_the_cut_picture(made, low_res):
    """Label maps, boxes and small pictures of pictures three times as wide as high."""
    config, directory, first_stage, _ = made
    config.data.update({"crop": "center", "low_res": low_res, "low_res_factor": 4})
    config.data.sizes = True
    config.data.layout.update({"vocab_size": 1024, "max_objects": 1, "encode_crop": False})
    images = np.random.default_rng(1).integers(0, 256, (BATCH, SIZE, 3 * SIZE, 3), np.uint8)
    labels = np.repeat([[0, 1, 2]], SIZE, axis=1) * np.ones((BATCH, SIZE, 1), np.int32)
    middle = np.array([[1 / 3, 0, 2 / 3, 1]], np.float32)
    source = data.ArraySource(
        {
            "image": images,
            "segmentation": labels,
            "boxes": [middle] * BATCH,
            "labels": [np.array([5])] * BATCH,
        }
    )
    cached = moments.with_moments(config, directory, first_stage, source)
    assert ("image" in cached[0]) == bool(low_res)
    if low_res:  # nothing that no batch shows is held
        assert cached[0]["image"].shape == (SIZE, SIZE, 3)
    transform = data.make_transform(config.data, train=True)
    for i in range(BATCH):
        got, want = (transform(each[i], np.random.default_rng(0)) for each in (cached, source))
        assert set(got) >= {"moments", "segmentation", "layout", *(["low_res"] if low_res else [])}
        np.testing.assert_array_equal(got["segmentation"], np.ones((SIZE, SIZE)))
        np.testing.assert_array_equal(got["layout"], [5, 0, 1023])
        np.testing.assert_array_equal(got["original_size"], [SIZE, 3 * SIZE])
        np.testing.assert_array_equal(got["crop_top_left"], [0, SIZE])
        for key in set(got) - {"moments"}:
            np.testing.assert_array_equal(got[key], want[key])


def test_a_picture_of_a_folder_that_changes_is_noticed(tmp_path):
    """Though its pixels aren't among the few that are compared."""
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    fields = {"name": "image_folder", "dir": str(tmp_path), "train_split": "all"}
    config = make_config("denoising").data
    config.update(fields)
    before = moments.sample_hash(data.make_source(config, "train"))
    assert moments.sample_hash(data.make_source(config, "train")) == before
    (tmp_path / "00a.png").symlink_to(tmp_path / "nowhere")
    assert moments.sample_hash(data.make_source(config, "train")) != before
    (tmp_path / "00a.png").unlink()
    Image.effect_noise((8, 8), 90).convert("RGB").save(tmp_path / "01.png")
    after = moments.sample_hash(data.make_source(config, "train"))
    (tmp_path / "01.png").rename(tmp_path / "01a.png")
    assert len({before, after, moments.sample_hash(data.make_source(config, "train"))}) == 3


def test_sizes_of_a_part_of_the_examples_are_left_out(made):
    """Some sources know the original size of some pictures, which no condition asks for."""
    config, directory, first_stage, images = made

    class Some:
        def __len__(self):
            return BATCH

        def __getitem__(self, index):
            known = {} if index % 2 else {"original_size": np.array([50, 60])}
            return {"image": images[index], "caption": "red", **known}

    cached = moments.with_moments(config, directory, first_stage, Some())
    assert set(cached[0]) == set(cached[1]) == {"moments", "caption", "window"}
