"""Textual inversion: files of others, words in prompts and negatives, rows that join the tables."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from test_convert_files import tensor, torch_zip
from test_model import RNG, model
from tiny import make_batch, make_config

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert.adapters import read_adapter, write_words
from latent_diffusion.convert.bundle import Bundle, Part, as_part
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.core.rng import init_key
from latent_diffusion.data import ArraySource
from latent_diffusion.data.tokenizers import WordTokenizer, load_tokenizer, with_words
from latent_diffusion.files.tensor import in_memory
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import init_from
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.tokenizer import make_tokenizer


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def sampled(prompts, adapters=(), **options):
    return model().sample(RNG, prompts, mode="single", num_steps=2, adapters=adapters, **options)


def file_of(folder, tensors, name="x"):
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def row(word):
    """A word's own row in the table of the model."""
    table = model().denoiser.params["conditioner"]["text"]["token_emb"]["embedding"]
    return np.asarray(table)[model().tokenizer([word])[0, 0]][None]


def test_a_word_of_two_known_vectors_is_the_two_words_and_its_weight_is_traced(tmp_path, caplog):
    path = file_of(tmp_path, {"<both>": np.concatenate([row("red"), row("cat")])})
    word = ldm.load_adapter(path)
    plain = sampled(["red cat"])
    np.testing.assert_array_equal(sampled(["<both>"], [(word, 1.0)]), plain)
    assert np.abs(sampled(["<both>"]) - plain).max() > 0.01  # nobody knows the word
    with caplog.at_level("WARNING"), jax.log_compiles():
        caplog.clear()
        half = sampled(["<both>"], [(word, 0.5)])
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    assert np.abs(half - plain).max() > 0.01
    # In negatives, beside another word, which comes first and has a name without signs.
    other = read_adapter(file_of(tmp_path, {"emb_params": draw(3, 6)}, "noun"))
    both = [(other, 1.0), (word, 1.0)]
    negative = sampled(["dog"], both, negative_prompts=["<both>"])
    np.testing.assert_array_equal(negative, sampled(["dog"], both, negative_prompts=["red cat"]))
    assert np.abs(sampled(["noun"], both) - sampled(["nouns"], both)).max() > 0.01


def test_files_of_all_programs_hold_the_same_vectors_and_both_layouts_are_written(tmp_path):
    vectors = draw(2, 6)
    stored, storages = tensor("FloatStorage", "0", 12, (2, 6), (6, 1)), {"0": vectors}
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": stored}, "name": "other"}
    torch_zip(tmp_path / "noun.pt", tree, storages)
    torch_zip(tmp_path / "noun.bin", {"<it>": stored}, storages)
    single = file_of(tmp_path, {"<it>": vectors[0]}, "single")
    for path, word in (("noun.pt", "noun"), ("noun.bin", "<it>")):
        read = read_adapter(tmp_path / path)
        assert (read.word, read.count) == (word, 2)
        np.testing.assert_array_equal(read.vectors[""], vectors)
        assert read_adapter(tmp_path / path, word="<mine>").word == "<mine>"
    assert read_adapter(single).vectors[""].shape == (1, 6)
    for layout, key in (("diffusers", "noun"), ("a1111", "emb_params")):
        write_words(read_adapter(tmp_path / "noun.pt"), tmp_path / "noun.safetensors", layout)
        written = load_file(tmp_path / "noun.safetensors")
        assert written.keys() == {key}
        np.testing.assert_array_equal(written[key], vectors)
        assert read_adapter(tmp_path / "noun.safetensors").word == "noun"
    dotted = read_adapter(file_of(tmp_path, {"<v1.5>": vectors}, "dotted"))
    assert dotted.word == "<v1.5>"
    pair = {"clip_l": draw(2, 6), "clip_g": draw(2, 10)}
    read = read_adapter(file_of(tmp_path, pair, "pair"))
    assert read.word == "pair" and read.vectors.keys() == pair.keys()
    several = file_of(tmp_path, {"<it>": draw(2, 6), "<that>": draw(1, 6)}, "several")
    with pytest.raises(ValueError, match=r"^\S+: 2 words in one file; .* own: <it>, <that>$"):
        read_adapter(several)
    write_words(read, tmp_path / "again.safetensors", "diffusers")
    for name, array in load_file(tmp_path / "again.safetensors").items():
        np.testing.assert_array_equal(array, pair[name])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"cat": draw(1, 6)}, "the word 'cat' exists already"),
        ({"<it>": draw(1, 7)}, "'<it>' has vectors of 7 numbers, but those of text have 6"),
        ({"clip_l": draw(1, 6), "clip_g": draw(1, 9)}, "clip_g of the word 'x' is for a text enc"),
        ({"clip_l": draw(1, 6), "clip_g": draw(2, 9)}, "different numbers of vectors"),
        ({"<it>": np.zeros((1, 6), np.int32)}, "int32 .* not vectors"),
        ({" it": draw(1, 6)}, "' it' is no word"),
    ],
)
def test_a_word_that_does_not_fit_is_refused_in_a_line(tensors, message, tmp_path):
    path = file_of(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}") as error:
        sampled(["dog"], [(ldm.load_adapter(path), 1.0)])
    assert "\n" not in str(error.value)


def test_added_words_are_whole_words_and_lie_beside_the_vocabulary(tmp_path):
    tokenizer = WordTokenizer.train(["a red cat"], 8, 4)
    more = with_words(tokenizer, {"noun": [8], "<it>": [9, 10]})
    rows = more(["noun", "nouns", "a <it>noun", "Noun", "<it> cat"])
    unknown, pad, a, cat = 1, 0, *tokenizer(["a cat"])[0, :2]
    np.testing.assert_array_equal(
        rows,
        [
            [8, pad, pad, pad],
            [unknown, pad, pad, pad],
            [a, 9, 10, 8],
            [unknown, pad, pad, pad],
            [9, 10, cat, pad],
        ],
    )
    assert more.unknown_words("noun <it> dog") == ["dog"]
    assert tokenizer.unknown_words("noun") == ["noun"]
    more.save(tmp_path / "words.json")
    again = load_tokenizer(tmp_path / "words.json")
    np.testing.assert_array_equal(again(["a <it>noun"]), rows[2:3])
    with pytest.raises(ValueError, match="the word '<it>' exists already"):
        with_words(again, {"<it>": [11]})


@pytest.mark.parametrize("names", [("noun", "noun-2"), ("noun-2", "noun")])
def test_of_added_words_that_begin_alike_the_longest_is_read(names):
    tokenizer = WordTokenizer.train(["a red cat"], 8, 4)
    ids = {"noun": [8], "noun-2": [9, 10]}
    more = with_words(tokenizer, {name: ids[name] for name in names})
    np.testing.assert_array_equal(more(["noun-2 noun"]), [[9, 10, 8, 0]])


def test_further_words_leave_an_added_word_its_rows(tmp_path):
    """As a run on other captions takes the words of a textual inversion that it starts from."""
    tokenizer = with_words(WordTokenizer.train(["a red cat"], 8, 4), {"<it>": [8, 9]})
    more = tokenizer.extended(["a <it> dog", "it cat", "dog"], 1)
    np.testing.assert_array_equal(more(["<it> dog it cat"]), [[8, 9, 5, 1]])
    assert more.vocab_size == 8
    many = tokenizer.extended(["p q r s t"], 9)
    np.testing.assert_array_equal(many(["p r s t", "<it> q cat"]), [[5, 7, 1, 1], [8, 9, 6, 3]])
    noun = with_words(tokenizer, {"noun": [10]}).extended(["Noun noun dog"], 9)
    noun.save(tmp_path / "words.json")  # a file in which "noun" would be two words isn't read
    again = load_tokenizer(tmp_path / "words.json")
    np.testing.assert_array_equal(again(["noun dog Noun"]), [[10, 5, 1, 0]])


def test_encoders_of_one_width_get_their_own_vectors(tmp_path):
    table = {"token_embedding/embedding": in_memory(draw(9, 6))}
    bundle = Bundle(conditioners={n: Part({}, table) for n in ("clip_text", "clip_text_2")})
    pair = {"clip_l": draw(2, 6), "clip_g": draw(2, 6, seed=1)}
    changes = read_adapter(file_of(tmp_path, pair)).changes(bundle)
    for name, key in (("clip_text", "clip_l"), ("clip_text_2", "clip_g")):
        rows = changes[f"conditioner/{name}/token_embedding/embedding"].rows
        np.testing.assert_array_equal(rows, pair[key])


def test_training_moves_the_new_rows_alone_bitwise(tmp_path):
    own = {"textual_inversion.word": "<it>", "textual_inversion.start": "red cat"}
    config = make_config("denoising", **own, **{"textual_inversion.num_vectors": 3})
    rows, base_dir, run = config.conditioners.text.vocab_size, tmp_path / "base", tmp_path / "run"
    tokenizer = WordTokenizer.train(["red cat"], rows, config.tokenizer.max_length)
    task = TASKS["denoising"](config)
    state, constants = jax.jit(lambda rng: task.init(rng, batch_spec(config)))(init_key(0))
    assert set(state.params) == {"words"} and set(state.params["words"]) == {"text"}
    fields = {**config.unet.to_dict(), "out_channels": 2}
    flat = flatten_dict(constants.base, sep="/")  # kernels that start at zero would hide the text
    draws = {k: 0.1 * draw(*x.shape) for k, x in flat.items() if k.endswith("l") and not x.any()}
    base = unflatten_dict({**flat, **draws}, sep="/")
    constants = constants.replace(base=base)
    bundle = Bundle(
        unet=as_part(fields, base["unet"]), tokenizer=tokenizer, diffusion=ASSUMED,
        conditioners={"text": as_part(config.conditioners.text.to_dict(),
                                      base["conditioner"]["text"])},
    )  # fmt: skip
    convert.write(bundle, base_dir, "orbax")
    state = init_from.start_from(config, state, bundle)
    table = np.asarray(base["conditioner"]["text"]["token_emb"]["embedding"])
    red, cat = tokenizer(["red cat"])[0, :2]
    first = table[[red, cat, red]]
    np.testing.assert_array_equal(state.params["words"]["text"], first)
    batch, before = make_batch(config), jax.tree.map(np.array, constants)
    batch["tokens"] = np.where(batch["tokens"] == 3, rows, batch["tokens"])  # its first vector
    step = jax.jit(task.train_step)
    for _ in range(2):
        state, _ = step(state, constants, batch, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, constants), before)
    trained = np.asarray(state.params["words"]["text"])
    assert np.abs(trained[0] - first[0]).max() > 1e-3
    # As the loop leaves it: the workdir is a model whose prompts may have the word.
    config.init_from = str(base_dir)
    captions = ArraySource({"caption": ["red cat", "red <it>"]})
    settings, words = make_tokenizer(config, captions, None, bundle)
    assert settings is config or settings == config
    np.testing.assert_array_equal(words(["red <it>"])[0, 1:], [rows, rows + 1, rows + 2])
    for others in (["red cat"], ["red cat red cat <it>"]):  # the last is cut after four tokens
        with pytest.raises(ValueError, match="word='<it>' is in none of the training captions"):
            make_tokenizer(config, ArraySource({"caption": others}), None, bundle)
    saved = {k: v for k, v in config.to_dict().items() if k != "autoencoder"}
    workdir.save_config(ConfigDict(saved), run)
    words.save(run / workdir.TOKENIZER)
    with Checkpointer(run / "checkpoints") as checkpoints:
        checkpoints.save(0, {"ema_params": state.ema_params})
    read = convert.read(run)
    whole = read.conditioners["text"].params["token_emb/embedding"].read()
    assert read.diffusion == config.diffusion.to_dict() != ASSUMED  # that of the run
    np.testing.assert_array_equal(whole[:rows], table)
    np.testing.assert_array_equal(whole[rows:], state.ema_params["words"]["text"])
    convert.write(read, tmp_path / "it.safetensors", "textual_inversion")
    again = read_adapter(tmp_path / "it.safetensors")
    assert again.word == "<it>"
    np.testing.assert_array_equal(again.vectors[""], whole[rows:])
    for adapter in (read_adapter(run), read_adapter(run, word="<that>")):  # the workdir itself
        assert adapter.path == str(run)
        np.testing.assert_array_equal(adapter.vectors[""], whole[rows:])
    assert adapter.word == "<that>" and read_adapter(run).word == "<it>"
