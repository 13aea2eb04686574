"""Tokenizers against transformers', id for id.

The vocabularies are small and made here, of what the texts below need; with those that CLIP and
BERT are trained with (CLIP_BPE=…/bpe_simple_vocab_16e6.txt.gz, BERT_VOCAB=…/vocab.txt) the same
tests run on them, too.
"""

import itertools
import json
import os
import random
import shutil
from collections import Counter

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from t5_vocabulary import CHARSMAP, VOCABULARY

from latent_diffusion.convert.tokenizers import write_tokenizer
from latent_diffusion.data.tokenizers import (
    BertTokenizer,
    ClipTokenizer,
    T5Tokenizer,
    load_tokenizer,
)
from latent_diffusion.data.tokenizers.bert import split_words as bert_words
from latent_diffusion.data.tokenizers.clip import split_words as clip_words

ODD = """
!|😀👩🏽‍🚀 flag 🇩🇪 ❤️|ÀÉÎõü ñ façade|İstanbul ΣΑΣ Straße|日本語のテキスト 한국어 中文
१२३ Ⅷ ² ½ 12,345.6|it's we'll I'd THEY'RE !'s 'tis rock'n'roll|_under_score--dash|ﬁ ǅ
«quoted» — “x” ≤ € ^`~ @#$%&*()
[MASK] [SEP]x [mask]|hello!! world! ok|مرحبا بالعالم|שלום עולם|Привет, мир!|ไทย|नमस्ते
x² + y² = z²|C++/C#|50% off…
""".replace("\n", "|").split("|")
ODD += ["", " ", "\t\n  ", "a" * 101, "a" * 400, "word " * 120, "e\u0301 x\u0300\u0301"]
ODD += ["a\x1fb c\u200bd\u00a0e\u3000f\x85g\x0bh\u2028i", "a\ufffdb\0c", "\ue000x"]
ODD += ["<|endoftext|> in the <|startoftext|>middle", "<|STARTOFTEXT|>", "a<|EndOfText|>! x"]
ODD += ["<|STARTOFTEXT|>! x", "<|startoftext|!>", "É<|StartOfText|>É", "<| startoftext|>"]
WORDS = """
a photo of the cat dog house tree red blue smiling woman man's astronaut riding horse on Mars
painting café naïve São Tomé 3 42 1999 don't high-resolution UPPER CamelCase 🦊 🚀 ☀️ 猫 мир
"""


def texts():
    """200 strings: the odd ones above, and captions of 1 to 40 words with some punctuation."""
    draw = random.Random(0)
    made = [
        "".join(
            draw.choice(WORDS.split()) + draw.choice([" ", " ", " ", ", ", "! "]) for _ in range(n)
        )
        for n in (draw.randint(1, 40) for _ in range(200 - len(ODD)))
    ]
    return ODD + made


def learn_merges(number):
    """Byte pairs in the order of their frequency in the texts: a small CLIP."""
    from latent_diffusion.data.tokenizers.clip import BYTE_CHARACTERS

    words = Counter(w for text in texts() for w in clip_words(text.lower()))
    split = {w: [BYTE_CHARACTERS[b] for b in w.encode()] for w in words}
    for symbols in split.values():
        symbols[-1] += "</w>"
    merges = []
    for _ in range(number):
        pairs = Counter()
        for word, symbols in split.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def clip_folder(folder):
    if "CLIP_BPE" in os.environ:
        tokenizer = ClipTokenizer.read(os.environ["CLIP_BPE"])
        vocabulary, merges = tokenizer.vocabulary, tokenizer.merges
    else:
        from latent_diffusion.data.tokenizers.clip import BYTE_CHARACTERS

        merges = learn_merges(300)
        single = list(BYTE_CHARACTERS.values())
        joined = [pair.replace(" ", "") for pair in merges]
        vocabulary = [*single, *(c + "</w>" for c in single), *joined]
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def bert_folder(folder):
    path = folder / "vocab.txt"
    if "BERT_VOCAB" in os.environ:
        shutil.copy(os.environ["BERT_VOCAB"], path)
        return folder
    words = Counter(w for text in texts() for w in bert_words(text) if len(w) < 30)
    characters = sorted({c for w in words for c in w if c.isascii()} | {"猫", "м", "и"})
    whole = [w for w, _ in words.most_common(90)]
    parts = [w[:k] for w in words for k in (2, 3) if len(w) > 4] + ["##" + w[2:] for w in whole]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *(f"##{c}" for c in characters[::2]), *whole, *parts]
    path.write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return folder


def compare(ours, theirs):
    length = ours.max_length
    kinds = set()
    for text in texts():
        want = theirs(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
        assert ours([text])[0].tolist() == want, repr(text)
        kinds |= set(want)
    assert len(kinds) > 100  # the texts are spelled, not unknown


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip(pad, tmp_path):
    folder = clip_folder(tmp_path)
    settings = {"model_max_length": 77, "pad_token": pad}
    theirs = transformers.CLIPTokenizer.from_pretrained(folder, **settings)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    compare(ClipTokenizer.read(folder), theirs)


def token(content, normalized):
    """A special token in the words of the tokenizers library."""
    where = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": normalized, **where}


@pytest.mark.parametrize("pad", ["<|endoftext|>", None])
@pytest.mark.parametrize("place", ["special_tokens_map.json", "added_tokens_decoder"])
def test_special_tokens_in_capitals(place, pad, tmp_path):
    """The folders of Stable Diffusion say `normalized`; so does the one that we write again."""
    (tmp_path / "read").mkdir()
    folder = clip_folder(tmp_path / "read")
    start, end = token("<|startoftext|>", True), token("<|endoftext|>", True)
    roles = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad or end}
    if place == "added_tokens_decoder":
        size = len(json.loads((folder / "vocab.json").read_text()))
        known = {str(size - 2): start, str(size - 1): {**end, "normalized": pad is None}}
        names = {role: "<|endoftext|>" for role in roles} | {"bos_token": "<|startoftext|>"}
        settings = {**names, place: known, "model_max_length": 77}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (folder / place).write_text(json.dumps(roles))
    ours = ClipTokenizer.read(folder)
    assert ours.any_case == ("<|endoftext|>", "<|startoftext|>")[pad is not None :]
    compare(ours, transformers.CLIPTokenizer.from_pretrained(folder))
    write_tokenizer(ours, tmp_path / "written")
    compare(ours, transformers.CLIPTokenizer.from_pretrained(tmp_path / "written"))


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_added_tokens(kind, tmp_path):
    """As textual inversion leaves them in a pipeline's folder."""
    make, ours = {"clip": (clip_folder, ClipTokenizer), "bert": (bert_folder, BertTokenizer)}[kind]
    name = {"clip": "CLIPTokenizer", "bert": "BertTokenizer"}[kind]
    theirs = getattr(transformers, name).from_pretrained(make(tmp_path), model_max_length=40)
    assert theirs.add_tokens(["<cat-toy>", "<cat-toy>_1"]) == 2
    theirs.save_pretrained(tmp_path / "saved")
    tokenizer = ours.read(tmp_path / "saved", 40)
    assert tokenizer.added.keys() == {"<cat-toy>", "<cat-toy>_1"}
    for text in ("a <cat-toy>", "red<cat-toy>house, <cat-toy> <cat-toy>_1", "<cat-toy", "cat-toy>"):
        want = theirs(text, padding="max_length", truncation=True, max_length=40)["input_ids"]
        assert tokenizer([text])[0].tolist() == want, text


def test_bert(tmp_path):
    folder = bert_folder(tmp_path)
    compare(BertTokenizer.read(folder), transformers.BertTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("charsmap", [CHARSMAP, None], ids=["normalised", "as it is"])
def test_t5(charsmap, tmp_path):
    """Also of the folder that we write again, and of our own file."""
    theirs = transformers.T5Tokenizer(
        vocab=VOCABULARY, _spm_precompiled_charsmap=charsmap, extra_ids=2
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = T5Tokenizer.read(tmp_path / "theirs", 60)
    write_tokenizer(ours, tmp_path / "ours")
    again = transformers.T5Tokenizer.from_pretrained(tmp_path / "ours")
    ours.save(tmp_path / "saved.json")
    saved = load_tokenizer(tmp_path / "saved.json")
    more = [
        "▁a▁▁b ▁",
        "a <extra_id_0>b</s> <pad>",
        "Ａ\u0300 A\u0300 e\u0301\u0301",
        "a\r\nb",
        "<unk>x",
    ]
    for text in texts() + more:
        want = theirs(text, padding="max_length", truncation=True, max_length=60)["input_ids"]
        assert ours([text])[0].tolist() == want, text
        assert saved([text])[0].tolist() == want, text
        options = {"padding": "max_length", "truncation": True, "max_length": 60}
        assert again(text, **options)["input_ids"] == want, text
