"""BERT's word pieces (Wu et al. 2016; Devlin et al. 2019), uncased, from its vocabulary.

The paper's text-to-image model reads captions through this tokenizer.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.data.tokenizers.added import (
    Words,
    read_added,
    with_added,
    with_words,
    without_added,
)
from latent_diffusion.data.tokenizers.rows import (
    Piece,
    check_length,
    fill_rows,
    reading_as,
    write_json,
)
from latent_diffusion.files.reading import MAX_TEXT, read_json, read_text

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_SPECIAL = (PAD, UNK, CLS, SEP, "[MASK]")
_LONGEST_WORD = 100  # characters; longer words are unknown
_CJK = (  # every ideograph is a word
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def _is_removed(character: str) -> bool:
    """Whether it is a control or format character, other than tabs and line ends."""
    if character in "\t\n\r":
        return False
    return character == "�" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")


def _stands_alone(character: str) -> bool:
    """Whether it is punctuation, a sign of ASCII or an ideograph."""
    if character.isascii():
        return not character.isalnum() and character.isprintable() and character != " "
    code = ord(character)
    return unicodedata.category(character)[0] == "P" or any(a <= code <= b for a, b in _CJK)


def split_words(text: str) -> Iterator[str]:
    """Split into lower-case words without accents; each sign and each ideograph is a word."""
    text = "".join(c for c in text if not _is_removed(c))
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    text = "".join(f" {c} " if _stands_alone(c) else c for c in text)
    yield from "".join(c.lower() for c in text).split()


class BertTokenizer:
    """[CLS], pieces, [SEP], padding …: the ids for a BERT-like encoder.

    vocabulary: the token of every id; pieces within a word begin with "##". max_length: L, with
    [CLS] and [SEP]. A special token's text in a caption becomes that token. Attributes: vocab_size,
    the number of ids; empty, the tokens of the empty prompt; pad_id, the id of the padding.
    """

    kind = "bert"
    added: Words = MappingProxyType({})  # see `with_words`

    def __init__(self, vocabulary: Sequence[str], max_length: int = 77):
        check_length(max_length, 2)
        self.vocabulary, self.max_length = tuple(vocabulary), max_length
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        for token in (PAD, UNK, CLS, SEP):
            if token not in self._ids:
                raise ValueError(f"the vocabulary has no {token!r}")
        self.vocab_size = len(self.vocabulary)
        self.empty, self.pad_id = (self._ids[CLS], self._ids[SEP]), self._ids[PAD]
        special = [re.escape(token) for token in _SPECIAL if token in self._ids]
        self._special = re.compile(f"({'|'.join(special)})")
        self._cut: set[str] = set()  # captions for which a warning was logged

    @classmethod
    def read(cls, path: str | Path, max_length: int = 77) -> "BertTokenizer":
        """Read a pipeline of diffusers, a tokenizer's folder, or its vocab.txt.

        Raises ValueError that names a path without an uncased BERT tokenizer.
        """
        path = Path(path)
        if (path / "tokenizer").is_dir():
            path = path / "tokenizer"
        with reading_as(path, "no BERT tokenizer"):
            if _is_cased(path):
                raise ValueError("it is cased; only uncased ones are supported")
            plain = cls(_read_vocabulary(path), max_length)
            tokenizer: BertTokenizer = with_words(plain, read_added(path, _SPECIAL))
            return tokenizer

    def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Token ids. A caption that is too long is cut, and a warning quotes the lost part."""
        return fill_rows(
            captions,
            with_added(self.added, self._pieces),
            self.max_length,
            self.pad_id,
            self._cut,
            start=self.empty[:1],
            end=self.empty[1:],
            join=lambda pieces: " ".join(pieces).replace(" ##", ""),
        )

    def unknown_words(self, caption: str) -> list[str]:
        """The words of a caption that can't be composed of pieces."""
        words, unknown = split_words(without_added(self.added, caption)), self._ids[UNK]
        return [word for word in words if self._word(word)[0].id == unknown]

    def _pieces(self, caption: str) -> list[Piece]:
        pieces: list[Piece] = []
        for part in self._special.split(caption):
            if self._special.fullmatch(part):
                pieces.append(Piece(self._ids[part], part))
            else:
                pieces += [piece for word in split_words(part) for piece in self._word(word)]
        return pieces

    def _word(self, word: str) -> list[Piece]:
        """Split a word into the longest pieces, from its start on; [UNK] if that fails."""
        unknown, pieces, start = [Piece(self._ids[UNK], word)], [], 0
        if len(word) > _LONGEST_WORD:
            return unknown
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None:
                return unknown
            token = prefix + word[start:end]
            pieces.append(Piece(self._ids[token], token))
            start = end
        return pieces

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `from_dict`, for JSON."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "vocabulary": list(self.vocabulary),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BertTokenizer":
        """The inverse of `to_dict`."""
        return cls(data["vocabulary"], data["max_length"])

    def save(self, path: str | Path) -> None:
        """Write JSON that `load_tokenizer` reads."""
        write_json(self, path)


def _is_cased(path: Path) -> bool:
    """Whether a folder, or the files beside a vocabulary, say that letters keep their case."""
    folder = path if path.is_dir() else path.parent
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and not read_json(settings).get("do_lower_case", True):
        return True
    single = path if path.suffix == ".json" else folder / "tokenizer.json"
    if path.suffix == ".txt" or not single.is_file():
        return False
    normalizer = read_json(single, MAX_TEXT).get("normalizer") or {}
    return normalizer.get("lowercase") is False or normalizer.get("strip_accents") is False


def _read_vocabulary(path: Path) -> list[str]:
    """The tokens of vocab.txt, one per line, or of a tokenizer.json, by id."""
    if path.is_dir():
        path = path / ("vocab.txt" if (path / "vocab.txt").is_file() else "tokenizer.json")
    text = read_text(path)
    if path.suffix != ".json":
        return text.removesuffix("\n").split("\n")
    ids = json.loads(text)["model"]["vocab"]
    return sorted(ids, key=lambda token: ids[token])
