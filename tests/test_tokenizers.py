import json
import logging

import numpy as np
import pytest

from latent_diffusion.tokenizers import TOKENIZERS, WordTokenizer, load_tokenizer, words

CAPTIONS = ["woman pilot", "man pilot", "woman cook", "São Tomé & Príncipe"]


def test_words():
    assert words("São Tomé & Príncipe") == ["sao", "tome", "principe"]
    assert words("woman’s hat") == words("Woman's hat") == ["womans", "hat"]
    assert words("1st place medal") == ["1st", "place", "medal"]
    assert words("keycap #") == ["keycap", "#"] != words("keycap *")
    assert words("medium-dark skin_tone") == ["medium-dark", "skin", "tone"]
    assert words("") == words(" -!? ") == []


def test_ids_fall_with_frequency_and_ties_are_alphabetical():
    tokenizer = WordTokenizer.train(CAPTIONS, vocab_size=100, max_length=3)
    assert tokenizer.vocabulary[:4] == ("pilot", "woman", "cook", "man")
    assert tokenizer.vocab_size == 100
    tokens = tokenizer(["Woman PILOT", "", "man judge"])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [[3, 2, 0], [0, 0, 0], [5, 1, 0]])
    assert tokenizer.unknown_words("man judge, 2nd") == ["judge", "2nd"]


def test_more_words_than_rows_drops_the_rarest():
    tokenizer = WordTokenizer.train(CAPTIONS, vocab_size=4, max_length=2)
    assert tokenizer.vocabulary == ("pilot", "woman")
    np.testing.assert_array_equal(tokenizer(["man pilot"]), [[1, 2]])
    with pytest.raises(ValueError, match="vocab_size 3 is below 2 words"):
        WordTokenizer(["a", "b"], 3, 2)
    with pytest.raises(ValueError, match="max_length"):
        WordTokenizer([], 3, 0)


def test_long_captions_are_cut_with_one_warning(caplog):
    tokenizer = WordTokenizer.train(CAPTIONS, vocab_size=10, max_length=2)
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer(["woman woman pilot"] * 2)
    np.testing.assert_array_equal(tokens, [[3, 3], [3, 3]])
    assert [r.getMessage() for r in caplog.records] == [
        "caption of 3 words cut to max_length=2: 'woman woman pilot'"
    ]


def test_a_bare_string_is_refused():
    with pytest.raises(TypeError, match="expected a list of captions"):
        WordTokenizer([], 2, 2)("pilot")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_save_and_load(kind, tmp_path):
    tokenizer = TOKENIZERS[kind].train([*CAPTIONS, "得 2"], vocab_size=20, max_length=4)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["kind"] == kind
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.to_dict() == tokenizer.to_dict()
    np.testing.assert_array_equal(again(CAPTIONS), tokenizer(CAPTIONS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tokenizer file"),
        ("[]", "not a tokenizer file"),
        ('{"kind": "word"}', "not a tokenizer file: KeyError"),
        ('{"kind": "bpe"}', "unknown tokenizer kind in .* 'bpe'; known: word"),
    ],
)
def test_broken_files_are_named(text, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
