"""A whole CLIP: in retrieval's databases and in the score of captions. Its numbers: parity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import default
from latent_diffusion import data
from latent_diffusion.convert import clip_image, clip_text
from latent_diffusion.convert.bundle import as_part
from latent_diffusion.convert.clip import load_clip
from latent_diffusion.convert.tables import prefixed, write_tensors
from latent_diffusion.evaluate.__main__ import evaluate
from latent_diffusion.files.tensor import in_memory
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.training.embed import embed_data

IMAGE = dict(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, projection_dim=6)
WORDS = ["a</w>", "b</w>", "c</w>", "a", "b", "c", "<|startoftext|>", "<|endoftext|>"]
TEXT = dict(vocab_size=len(WORDS), max_length=5, width=8, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel's folder with random weights."""
    path, rng = tmp_path_factory.mktemp("clip"), np.random.default_rng(0)

    def draw(family, fields):
        return jax.tree.map(
            lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), family.shapes(fields)
        )

    image, text = draw(clip_image, IMAGE), draw(clip_text, TEXT)
    table = prefixed(clip_text.transformers_table(TEXT), "text_model.")
    tensors = write_tensors(clip_image.transformers_table(IMAGE), as_part({}, image).params)
    tensors |= write_tensors(table, as_part({}, text).params)
    tensors["text_projection.weight"] = in_memory(rng.standard_normal((6, 8)).astype(np.float32))
    write_safetensors(path / "model.safetensors", tensors)
    config = {
        "text_config": clip_text.config_from_fields(TEXT),
        "vision_config": clip_image.config_from_fields(IMAGE),
        "projection_dim": 6,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return path


def test_texts_are_read_where_they_end(folder):
    clip = load_clip(folder)
    alone, among = clip.embed_texts(["a b"]), clip.embed_texts(["c", "a b", "a b c"])
    assert among.shape == (3, 6)
    np.testing.assert_allclose(among[1], alone[0], rtol=1e-5)
    assert np.abs(among[0] - among[1]).max() > 0.1
    # Causal: what comes after the end isn't seen, so cutting the padding changes nothing.
    tokens = clip.tokenizer(["a b"])
    padded = np.where(np.arange(5) > 3, 0, tokens)
    np.testing.assert_allclose(clip.of_tokens(clip.params, jnp.asarray(padded)), alone, rtol=1e-5)


def test_a_half_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder of a CLIPModel"):
        load_clip(tmp_path / "nothing")


def make_data(root):
    config = default.get_config().data
    config.update({"name": "image_folder", "dir": str(root), "image_size": 8})
    rng = np.random.default_rng(1)
    for split, count in (("train", 5), ("test", 3)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
    return config


def test_a_data_set_is_embedded_once_and_for_all(folder, tmp_path):
    config = make_data(tmp_path / "pictures")
    embed_data(config, folder, tmp_path / "embedded")
    config.update({"embedding": "precomputed", "embedding_path": str(tmp_path / "embedded")})
    config.num_neighbours = 2
    train, test = (data.make_source(config, split) for split in ("train", "test"))
    clip = load_clip(folder)
    for source in (train, test):
        x = np.stack([source[i]["image"] for i in range(len(source))]) / np.float32(127.5) - 1
        want = np.asarray(clip.of_images(clip.params, jnp.asarray(x)))
        got = np.stack([source[i]["image_embedding"] for i in range(len(source))])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert test[0]["neighbours"].shape == (2, 6)
    smaller = ConfigDict({**config, "train_split": "test"})
    with pytest.raises(ValueError, match=r"train.npz has 5 embeddings, the data 3 pictures"):
        data.make_source(smaller, "train")
    (tmp_path / "pictures" / "train" / "0.png").rename(tmp_path / "pictures" / "train" / "9.png")
    with pytest.raises(ValueError, match=r"train.npz has 0.png as picture 0, the data 1.png; make"):
        data.make_source(config, "train")
    config.embedding_path = str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no .*elsewhere/test.npz; python -m latent_diff.*embed"):
        data.make_source(config, "test")


def test_pictures_are_held_against_their_captions(folder, tmp_path):
    root = tmp_path / "samples"
    make_data(root)
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    options = {"samples": str(root), "metrics": ["clip"], "num_images": 4}
    with pytest.raises(ValueError, match="needs --clip_path: a CLIPModel's folder"):
        evaluate(**options)
    with pytest.raises(ValueError, match=r"a caption for each of 8 pictures; .*prompts.txt has 0"):
        evaluate(**options, clip_path=str(folder))
    captions = ["a b", "c", "b b b", "a"]
    (root / "prompts.txt").write_text("".join(f"{line}\n" for line in [*captions, *"cccc"]))
    record = evaluate(**options, clip_path=str(folder))
    clip = load_clip(folder)
    x = np.stack([np.asarray(Image.open(root / f"{i}.png")) for i in range(4)])
    a = np.asarray(clip.of_images(clip.params, jnp.asarray(x / np.float32(127.5) - 1)))
    b = clip.embed_texts(captions)
    cosines = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = 100 * np.maximum(cosines, 0).mean()
    assert record["metrics"]["clip_score"] == pytest.approx(expected, rel=1e-3)
