import base64
import gzip
import json
import logging
import shutil

import numpy as np
import pytest
import t5_vocabulary

from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.convert.tokenizers import (
    padded,
    with_second,
    with_tokenizer,
    write_tokenizer,
)
from latent_diffusion.data.tokenizers import (
    TOKENIZERS,
    BertTokenizer,
    ClipTokenizer,
    WordTokenizer,
    load_tokenizer,
    with_words,
    words,
)
from latent_diffusion.data.tokenizers import clip as clip_words
from latent_diffusion.data.tokenizers import rows as token_rows
from latent_diffusion.data.tokenizers.bert import split_words as bert_words
from latent_diffusion.data.tokenizers.clip_t5 import ClipT5Tokenizer
from latent_diffusion.data.tokenizers.t5 import T5Tokenizer

CAPTIONS = ["woman pilot", "man pilot", "woman cook", "São Tomé & Príncipe"]

# A vocabulary of bytes, bytes at a word's end, and a few merges, numbered as CLIP numbers its own.
MERGES = ["c a", "ca t</w>", "a t</w>", "' s</w>"]
BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
CLIP = [*BYTES, *(b + "</w>" for b in BYTES), "ca", "cat</w>", "at</w>", "'s</w>", *SPECIAL]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "woman", "pi", "##lot", "sao", "!", "得", "cook"]


def make(kind):
    if kind == "bert":
        return BertTokenizer(BERT, max_length=6)
    if kind == "word":
        return WordTokenizer.train([*CAPTIONS, "得 2"], vocab_size=20, max_length=4)
    if kind == "t5":
        return T5Tokenizer(
            t5_vocabulary.VOCABULARY, 5, base64.b64encode(t5_vocabulary.CHARSMAP).decode()
        )
    clip = ClipTokenizer(CLIP, MERGES, max_length=6)
    return ClipT5Tokenizer(clip, make("t5")) if kind == "clip_t5" else clip


def write_clip(folder, **settings):
    """The files of a diffusers tokenizer folder."""
    folder.mkdir(parents=True)
    ids = {token: i for i, token in enumerate(CLIP)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


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
        "caption of 3 tokens cut to 2 (max_length=2), lost: 'pilot'"
    ]


def test_what_a_tokenizer_remembers_of_texts_is_bounded(monkeypatch, caplog):
    """A server reads other texts for months."""
    monkeypatch.setattr(token_rows, "MOST_NAMED", 2)
    monkeypatch.setattr(clip_words, "MOST_WORDS", 3)
    tokenizer, texts = ClipTokenizer(CLIP, MERGES, max_length=3), ["cat a", "a cat", "at ca", "b c"]
    tokens = [tokenizer([text])[0].tolist() for text in texts * 2]
    assert tokens == [make("clip")([text.split()[0]])[0, :3].tolist() for text in texts * 2]
    assert len(caplog.records) == len(tokenizer._cut) == 2 and len(tokenizer._merged) <= 3


def test_a_bare_string_is_refused():
    with pytest.raises(TypeError, match="expected a list of captions"):
        WordTokenizer([], 2, 2)("pilot")


def test_clip_merges_pairs_in_the_order_they_were_learned():
    tokenizer, first = ClipTokenizer(CLIP, MERGES, max_length=6), len(BYTES)
    ids = {token: i for i, token in enumerate(CLIP)}
    start, end = ids[SPECIAL[0]], ids[SPECIAL[1]]
    tokens = tokenizer(["CAT", "a  Cat's!", "acat", ""])
    np.testing.assert_array_equal(
        tokens,
        [
            [start, ids["cat</w>"], end, end, end, end],
            [start, ids["a</w>"], ids["cat</w>"], ids["'s</w>"], first + BYTES.index("!"), end],
            [start, ids["a"], ids["cat</w>"], end, end, end],
            [start, end, end, end, end, end],
        ],
    )
    assert tokenizer.vocab_size == len(CLIP) and tokenizer.unknown_words("得") == []


def test_clip_splits_texts_as_its_authors_do(tmp_path):
    """Numerals stand alone, letters and signs in runs; letters are composed and made small."""
    assert list(clip_words.split_words("no.2024's x² -- it's")) == [
        *("no", ".", "2", "0", "2", "4", "'s", "x", "²", "--", "it", "'s")
    ]
    tokenizer = ClipTokenizer(CLIP, MERGES, max_length=9)
    for one, other, same in (
        ("e\u0301", "é", True), ("ΟΣ", "οσ", True), ("ΟΣ", "ος", False), ("a\xa0at", "a at", True),
    ):  # fmt: skip
        assert np.array_equal(*tokenizer([one, other])) == same
    # The packages of CLIP have more merges than the model knows.
    packed = tmp_path / "bpe.txt.gz"
    lines = ["header", *(f"a{i} b" for i in range(50_000))]
    packed.write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    assert ClipTokenizer.read(packed).vocab_size == 49408


def test_clip_pads_as_told_and_says_what_it_cut(caplog):
    tokenizer = ClipTokenizer(CLIP, MERGES, max_length=4, pad="!")
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer(["cat", "cat cat cat é"])
    assert tokens[0].tolist() == [len(CLIP) - 2, CLIP.index("cat</w>"), len(CLIP) - 1, 0]
    assert tokens[1, -1] == len(CLIP) - 1  # the end is kept
    (record,) = caplog.records
    assert record.getMessage().endswith("cut to 2 (max_length=4), lost: 'cat é'")


def test_clip_reads_the_files_there_are(tmp_path):
    want = ClipTokenizer(CLIP, MERGES, max_length=9, pad="!").to_dict()
    write_clip(tmp_path / "pipeline" / "tokenizer", model_max_length=9, pad_token={"content": "!"})
    assert ClipTokenizer.read(tmp_path / "pipeline").to_dict() == want
    model = {"vocab": {t: i for i, t in enumerate(CLIP)}, "merges": [m.split() for m in MERGES]}
    single = tmp_path / "tokenizer.json"
    single.write_text(json.dumps({"model": model, "added_tokens": [{"id": 0, "content": "!"}]}))
    assert ClipTokenizer.read(single, max_length=9, pad="!").to_dict() == want
    packed = tmp_path / "bpe.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(["header", *MERGES, ""]).encode()))
    assert ClipTokenizer.read(packed, max_length=9, pad="!").to_dict() == want
    merges = tmp_path / "pipeline" / "tokenizer" / "merges.txt"
    merges.write_bytes(b"\xef\xbb\xbf" + merges.read_bytes().replace(b"\n", b"\r\n"))
    assert ClipTokenizer.read(tmp_path / "pipeline").to_dict() == want  # as Windows writes it
    with pytest.raises(ValueError, match=r"nowhere is no CLIP tokenizer: .*No such file"):
        ClipTokenizer.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no CLIP tokenizer: ValueError: the vocabulary has no"):
        ClipTokenizer.read(single, pad="[PAD]")


def test_clip_looks_for_special_tokens_in_any_case_where_its_files_say_so(tmp_path):
    start, end = len(CLIP) - 2, len(CLIP) - 1
    plain, flags = ClipTokenizer(CLIP, MERGES, 40), {"normalized": True}
    assert start in plain(["<|startoftext|>"])[0, 1:]
    assert start not in plain(["<|STARTOFTEXT|>"])[0, 1:]
    both = {
        "bos_token": {"content": SPECIAL[0], **flags},
        "eos_token": {"content": SPECIAL[1], **flags},
    }
    write_clip(tmp_path / "a", **both)  # as in the folders of Stable Diffusion
    tokenizer = ClipTokenizer.read(tmp_path / "a", 40)
    row = tokenizer(["cat<|STARTOFTEXT|>cat <|EndOfText|>"])[0].tolist()
    assert row[:5] == [start, CLIP.index("cat</w>"), start, CLIP.index("cat</w>"), end]
    assert ClipTokenizer.from_dict(tokenizer.to_dict()).to_dict() == tokenizer.to_dict()
    write_clip(tmp_path / "b", **both, pad_token=SPECIAL[1])  # one of its roles lacks the flag
    assert ClipTokenizer.read(tmp_path / "b", 40).any_case == (SPECIAL[0],)
    words = tokenizer(["<|startoftext|!>x"])[0], plain(["<|STARTOFTEXT|>! x"])[0]
    assert CLIP.index("!</w>") in words[1] and CLIP.index("!</w>") not in words[0]


PLACES = {
    "added_tokens.json": {"<it>": len(CLIP), "sks": len(CLIP) + 1},
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            str(i): {"content": token}
            for i, token in enumerate([*SPECIAL, "<it>", "sks"], len(CLIP) - 2)
        }
    },
    "tokenizer.json": {
        "model": {"vocab": {t: i for i, t in enumerate(CLIP)}, "merges": MERGES},
        "added_tokens": [
            {"content": token, "id": i}
            for i, token in enumerate([*SPECIAL, "<it>", "sks"], len(CLIP) - 2)
        ],
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_added_tokens_are_words(name, tmp_path):
    write_clip(tmp_path / "clip")
    (tmp_path / "clip" / name).write_text(json.dumps(PLACES[name]))
    if name == "tokenizer.json":
        (tmp_path / "clip" / "vocab.json").unlink()  # as transformers 5 writes a folder
    tokenizer = ClipTokenizer.read(tmp_path / "clip", 8)
    cat, more, end = CLIP.index("cat</w>"), len(CLIP), len(CLIP) - 1
    row = tokenizer(["cat <it>cat sks"])[0].tolist()
    assert row == [end - 1, cat, more, cat, more + 1, end, end, end]
    assert tokenizer.vocab_size == len(CLIP)
    if name != "tokenizer.json":
        return
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")
    added = {"[MASK]": 4, "<it>": len(BERT)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    assert BertTokenizer.read(folder, 6)(["cook<it>"])[0].tolist() == [2, 10, 11, 3, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"cat": 900}, "the word 'cat' exists already"),
        ("added_tokens.json", {"<it>": "x"}, "invalid literal"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"900": {"content": "<it>", "lstrip": True}}},
            "the added token '<it>' has lstrip=true",
        ),
        (
            "special_tokens_map.json",
            {"additional_special_tokens": ["<it>"]},
            "the additional special token '<it>' has no id",
        ),
        (
            "tokenizer.json",
            {"added_tokens": [{"content": t, "id": i} for t, i in (("<it>", 9), ("<it>", 8))]},
            "the added token '<it>' has two ids: 9 and 8",
        ),
    ],
)
def test_added_tokens_that_are_not_read_are_refused_by_name(name, content, message, tmp_path):
    write_clip(tmp_path / "clip")
    (tmp_path / "clip" / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{tmp_path}.* is no CLIP tokenizer: .*{message}"):
        ClipTokenizer.read(tmp_path / "clip", 8)


def test_special_tokens_of_t5_take_the_spaces_on_their_side(tmp_path):
    first, second = "<extra_id_0>", "<extra_id_1>"
    special = ["<pad>", "</s>", "<unk>", first, second]
    tokenizer = T5Tokenizer(
        t5_vocabulary.VOCABULARY, 9, special=special, before=[first], behind=[second]
    )
    write_tokenizer(tokenizer, tmp_path)
    read = T5Tokenizer.read(tmp_path, 9)
    assert (read.before, read.behind) == ((first,), (second,))
    captions = [f"a {first} red", f"a{first} red", f"a {second} red", f"a {second}red"]
    rows = read(captions)
    np.testing.assert_array_equal(rows, tokenizer(captions))
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], rows[3])
    assert (rows[0] != rows[2]).any()


def test_an_added_word_needs_a_row_of_the_text_encoder(tmp_path):
    write_clip(tmp_path / "clip")
    (tmp_path / "clip" / "added_tokens.json").write_text(json.dumps({"<it>": len(CLIP)}))
    for rows in (len(CLIP), len(CLIP) + 1):
        fields = {"vocab_size": rows, "max_length": 8}
        bundle = Bundle(conditioners={"clip_text": Part(fields, {}, {})})
        if rows > len(CLIP):
            read = with_tokenizer(bundle, tmp_path / "clip").tokenizer
            assert read.added == {"<it>": (len(CLIP),)}
            continue
        with pytest.raises(ValueError, match=f"'<it>' has the id {rows}, but .* has {rows} rows"):
            with_tokenizer(bundle, tmp_path / "clip")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Its further tokens have no rows in the table; their embeddings would be NaN."""
    pair = make("clip_t5")
    for name, own in (("tokenizer", pair.clip), ("tokenizer_3", pair.t5)):
        write_tokenizer(own, tmp_path / name)
    (tmp_path / "vocab.txt").write_text("\n".join(BERT), encoding="utf-8")
    rows = {"clip_text": pair.clip.vocab_size, "t5_text": pair.t5.vocab_size, "text": len(BERT)}

    def read(**lacking):
        sizes = {name: number - lacking.get(name, 0) for name, number in rows.items()}
        parts = {n: Part({"vocab_size": x, "max_length": 8}, {}, {}) for n, x in sizes.items()}
        words = parts.pop("text")
        with_tokenizer(Bundle(conditioners=parts), tmp_path / "tokenizer")
        with_tokenizer(Bundle(conditioners={"text": words}), tmp_path / "vocab.txt")

    read()
    for name, number in rows.items():
        with pytest.raises(ValueError, match=f"of {number} tokens, .* table has {number - 1} rows"):
            read(**{name: 1})


def test_an_added_word_needs_a_row_of_both_encoders_and_both_tokenizers(tmp_path):
    for folder in ("tokenizer", "tokenizer_2"):
        write_clip(tmp_path / folder)
    added = tmp_path / "tokenizer" / "added_tokens.json"
    added.write_text(json.dumps({"<it>": len(CLIP)}))

    def read(first, second):
        rows = {"clip_text": first, "clip_text_2": second}
        parts = {n: Part({"vocab_size": r, "max_length": 8}, {}, {}) for n, r in rows.items()}
        bundle = with_tokenizer(Bundle(conditioners=parts), tmp_path / "tokenizer")
        return with_second(bundle, tmp_path / "tokenizer_2")

    with pytest.raises(ValueError, match=f"'<it>' has the id {len(CLIP)}, but a text encoder's"):
        read(len(CLIP) + 1, len(CLIP))
    with pytest.raises(ValueError, match="the added word '<it>' isn't the same in both tokenizers"):
        read(len(CLIP) + 1, len(CLIP) + 1)
    shutil.copy(added, tmp_path / "tokenizer_2")
    assert read(len(CLIP) + 1, len(CLIP) + 1).tokenizer.added == {"<it>": (len(CLIP),)}


def test_an_encoder_that_pads_with_token_0_does_so_unless_the_files_say_otherwise(tmp_path):
    """Stable Diffusion 2, from a bare vocabulary; the refiner, whatever its tokenizer says."""
    tokenizer = make("clip")
    write_tokenizer(padded(tokenizer, 0), tmp_path / "bare")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    write_tokenizer(tokenizer, tmp_path / "other")

    def pad_id(name, folder, **fields):
        fields = {"pad_id": 0, "max_length": 8, **fields}
        bundle = with_tokenizer(
            Bundle(conditioners={name: Part(fields, {}, {})}), tmp_path / folder
        )
        return bundle.conditioners[name].fields["pad_id"]

    first = tokenizer.vocabulary.index("!")
    assert pad_id("clip_text", "bare") == first == 0
    assert pad_id("clip_text", "other") == tokenizer.pad_id != 0
    assert pad_id("clip_text_2", "other", repad=True) == 0


def test_what_a_folder_cannot_hold_stays_in_a_tokenizer_with_other_padding(tmp_path):
    tokenizer = ClipTokenizer(CLIP, MERGES, 6, any_case=SPECIAL[:1])
    write_tokenizer(padded(tokenizer, 0), tmp_path / "clip")
    want = {**tokenizer.to_dict(), "pad": "!"}
    assert ClipTokenizer.read(tmp_path / "clip").to_dict() == want
    more = padded(with_words(tokenizer, {"<it>": [len(CLIP)]}), 0)
    assert more(["<it>"])[0].tolist() == [len(CLIP) - 2, len(CLIP), len(CLIP) - 1, 0, 0, 0]
    with pytest.raises(ValueError, match="no place for the added words <it>; save the model as"):
        write_tokenizer(more, tmp_path / "other")


def test_three_text_encoders_have_the_tokenizers_of_their_folders(tmp_path):
    pair = make("clip_t5")
    for name, own in (("tokenizer", pair.clip), ("tokenizer_3", pair.t5)):
        write_tokenizer(own, tmp_path / name)
    write_tokenizer(padded(pair.clip, 33), tmp_path / "tokenizer_2")
    lengths = {"clip_text": 6, "clip_text_2": 6, "t5_text": 5}
    parts = {name: Part({"max_length": length}, {}, {}) for name, length in lengths.items()}
    read = with_tokenizer(Bundle(conditioners=parts), tmp_path / "tokenizer")
    read = with_second(read, tmp_path / "tokenizer_2")
    np.testing.assert_array_equal(read.tokenizer(CAPTIONS), pair(CAPTIONS))
    shorter = ClipT5Tokenizer.read(tmp_path, pair.clip.max_length + 3)  # T5 has the rest
    np.testing.assert_array_equal(shorter(["a"]), pair(["a"])[:, :-2])
    with pytest.raises(ValueError, match="max_length=6 leaves no room for T5 behind CLIP's 6"):
        ClipT5Tokenizer.read(tmp_path, pair.clip.max_length)
    fields = {name: part.fields for name, part in read.conditioners.items()}
    assert [fields[name]["pad_id"] for name in lengths] == [pair.clip.pad_id, 33, pair.t5.pad_id]
    assert [fields[n]["empty"] for n in lengths] == [pair.clip.empty] * 2 + [pair.t5.empty]


def test_bert_takes_the_longest_piece_that_fits():
    tokenizer = make("bert")
    tokens = tokenizer(["São PILOT!", "woman judge", "a得", ""])
    expected = [[2, 7, 5, 6, 8, 3], [2, 4, 1, 3, 0, 0], [2, 1, 9, 3, 0, 0], [2, 3, 0, 0, 0, 0]]
    np.testing.assert_array_equal(tokens, expected)
    assert tokenizer.unknown_words("woman judge, 得") == ["judge", ","]
    assert tokenizer.vocab_size == len(BERT)


def test_bert_splits_at_signs_and_drops_accents_and_control_characters():
    assert list(bert_words("Sa\u0303o+$5\u200b,\x00得é!")) == [
        *("sao", "+", "$", "5", ",", "得", "e", "!")
    ]
    long = BertTokenizer([*BERT, "a", "##a"], 200)
    assert [len(long._pieces(n * "a")) for n in (100, 101)] == [100, 1]


def test_t5_normalises_as_its_charsmap_says():
    tokenizer = make("t5")
    plain = T5Tokenizer(t5_vocabulary.VOCABULARY, tokenizer.max_length)
    changes = {"a\u200bred": "a red", "re\x1fd": "red", "x²": "x2", "ﬁ": "fi", "e\u0301": "é"}
    for one, other in changes.items():
        np.testing.assert_array_equal(*tokenizer([one, other]))
        assert not np.array_equal(*plain([one, other]))


def test_bert_says_what_it_cut(caplog):
    with caplog.at_level(logging.WARNING):
        tokens = make("bert")(["woman cook woman pilot"])
    assert tokens[0].tolist() == [2, 4, 10, 4, 5, 3]
    (record,) = caplog.records
    assert record.getMessage() == "caption of 5 tokens cut to 4 (max_length=6), lost: '##lot'"


def test_bert_reads_the_files_there_are(tmp_path):
    folder = tmp_path / "pipeline" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")
    for path in (tmp_path / "pipeline", folder, folder / "vocab.txt"):
        assert BertTokenizer.read(path, 6).to_dict() == make("bert").to_dict()
    (folder / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert BertTokenizer.read(folder, 6).to_dict() == make("bert").to_dict()
    single = tmp_path / "tokenizer.json"
    single.write_text(json.dumps({"model": {"vocab": {t: i for i, t in enumerate(BERT)}}}))
    assert BertTokenizer.read(single, 6).to_dict() == make("bert").to_dict()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    for path in (folder, folder / "vocab.txt"):
        with pytest.raises(ValueError, match="no BERT tokenizer: ValueError: it is cased"):
            BertTokenizer.read(path)
    model = json.loads(single.read_text())
    single.write_text(json.dumps({**model, "normalizer": {"lowercase": False}}))
    with pytest.raises(ValueError, match="it is cased"):
        BertTokenizer.read(single)
    single.write_text(json.dumps({**model, "normalizer": {"lowercase": True}}))
    assert BertTokenizer.read(single, 6).to_dict() == make("bert").to_dict()
    with pytest.raises(ValueError, match=r"nowhere is no BERT tokenizer: .*No such file"):
        BertTokenizer.read(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "clip_t5"])
def test_the_empty_prompt_is_what_conditioners_are_told(kind):
    tokenizer = make(kind)
    padding = [tokenizer.pad_id] * (tokenizer.max_length - len(tokenizer.empty))
    assert tokenizer([""])[0].tolist() == [*tokenizer.empty, *padding]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_save_and_load(kind, tmp_path):
    tokenizer = make(kind)
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
        (
            '{"kind": "bpe"}',
            "unknown tokenizer kind in .* 'bpe'; known: bert, clip, clip_t5, t5, word",
        ),
    ],
)
def test_broken_files_are_named(text, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
