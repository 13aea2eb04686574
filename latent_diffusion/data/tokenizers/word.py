"""A tokenizer of whole words, numbered by their frequency in the training captions."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.data.tokenizers.added import Words, with_added, without_added
from latent_diffusion.data.tokenizers.rows import Piece, check_length, fill_rows, write_json

logger = logging.getLogger(__name__)

PAD, UNK = 0, 1
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[#*]")  # # and * are words: captions of keycaps
_APOSTROPHES = re.compile(r"['’`]")


def words(caption: str) -> list[str]:
    """Lower-case words of letters and digits, without accents and apostrophes.

    "São Tomé & Príncipe" -> sao tome principe; "man’s shoe" -> mans shoe; "e-mail" -> e mail.
    """
    if not caption.isascii():
        decomposed = unicodedata.normalize("NFKD", caption)
        caption = "".join(c for c in decomposed if not unicodedata.combining(c))
    return _WORD.findall(_APOSTROPHES.sub("", caption).lower())


def _ranked(captions: Iterable[str]) -> list[str]:
    """The words of the captions by falling frequency, ties by alphabet."""
    counts = Counter(word for caption in captions for word in words(caption))
    return sorted(counts, key=lambda word: (-counts[word], word))


class WordTokenizer:
    """One id per word, the most frequent first; 0 is the padding, 1 is for every unknown word.

    vocabulary: the words of ids 2, 3, ... vocab_size: number of rows of the embedding table, which
    the vocabulary need not fill. max_length: tokens per caption, L.
    """

    kind = "word"
    added: Words = MappingProxyType({})  # see `with_words`
    empty: tuple[int, ...] = ()  # tokens of the empty prompt, before its padding
    pad_id = PAD

    def __init__(self, vocabulary: Sequence[str], vocab_size: int, max_length: int):
        if vocab_size < len(vocabulary) + 2:
            raise ValueError(f"vocab_size {vocab_size} is below {len(vocabulary)} words + 2")
        check_length(max_length, 1)
        self.vocabulary = tuple(vocabulary)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._cut: set[str] = set()  # captions for which a warning was logged
        self._ids = {word: i for i, word in enumerate(vocabulary, start=2)}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int) -> "WordTokenizer":
        """Number the words by falling frequency, ties by alphabet; the rarest words get no id."""
        return cls(_ranked(captions)[: max(vocab_size - 2, 0)], vocab_size, max_length)

    def extended(self, captions: Iterable[str], num_words: int) -> "WordTokenizer":
        """This tokenizer with the `num_words` most frequent other words, in further rows.

        Rows of added words keep their places, and no word gets a row behind them.
        """
        texts = (without_added(self.added, caption) for caption in captions)
        known = self._ids.keys() | {word.lower() for word in self.added}
        others = [word for word in _ranked(texts) if word not in known]
        if self.added:
            free = min(min(ids) for ids in self.added.values()) - 2 - len(self.vocabulary)
            if free < min(num_words, len(others)):
                logger.warning(
                    "%d words of the captions get no row of the text encoder, in whose last rows "
                    "are added words",
                    min(num_words, len(others)) - free,
                )
            num_words = min(num_words, free)
        vocabulary = (*self.vocabulary, *others[:num_words])
        vocab_size = max(self.vocab_size, len(vocabulary) + 2)
        more = WordTokenizer(vocabulary, vocab_size, self.max_length)
        more.added = self.added
        return more

    def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Token ids, padded with 0 on the right. Longer captions are cut, with one warning each."""
        pieces_of = with_added(self.added, self._pieces)
        return fill_rows(captions, pieces_of, self.max_length, PAD, self._cut)

    def _pieces(self, caption: str) -> list[Piece]:
        return [Piece(self._ids.get(word, UNK), word) for word in words(caption)]

    def unknown_words(self, caption: str) -> list[str]:
        """The caption's words that aren't in the vocabulary."""
        return [word for word in words(without_added(self.added, caption)) if word not in self._ids]

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `from_dict`, for JSON."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "vocabulary": list(self.vocabulary),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "WordTokenizer":
        """The inverse of `to_dict`."""
        return cls(data["vocabulary"], data["vocab_size"], data["max_length"])

    def save(self, path: str | Path) -> None:
        """Write JSON that `load_tokenizer` reads."""
        write_json(self, path)
