"""Words to integers.

A tokenizer maps captions to int32 [N L] with a fixed L, and is saved beside the checkpoint: the
numbers mean nothing without it.
"""

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.types import lookup

logger = logging.getLogger(__name__)

PAD, UNK = 0, 1
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[#*]")  # the two signs that tell keycaps apart are words
_APOSTROPHES = re.compile(r"['’`]")


def words(caption: str) -> list[str]:
    """Lower-case words of letters and digits, accents and apostrophes dropped.

    "São Tomé & Príncipe" -> sao tome principe; "man’s shoe" -> mans shoe; "e-mail" -> e mail.
    """
    if not caption.isascii():
        decomposed = unicodedata.normalize("NFKD", caption)
        caption = "".join(c for c in decomposed if not unicodedata.combining(c))
    return _WORD.findall(_APOSTROPHES.sub("", caption).lower())


class WordTokenizer:
    """One row per word, the most frequent first; 0 pads, 1 stands for every unknown word.

    vocabulary: the words of rows 2, 3, ... vocab_size: rows of the table, fixed by the
    config whether or not the vocabulary fills them. max_length: tokens per caption, L.
    """

    kind = "word"

    def __init__(self, vocabulary: Sequence[str], vocab_size: int, max_length: int):
        if vocab_size < len(vocabulary) + 2:
            raise ValueError(f"vocab_size {vocab_size} is below {len(vocabulary)} words + 2")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.vocabulary = tuple(vocabulary)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._cut: set[str] = set()  # captions warned about
        self._ids = {word: i for i, word in enumerate(vocabulary, start=2)}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int) -> "WordTokenizer":
        """Number the words by falling frequency, ties by alphabet; the rarest find no row."""
        counts = Counter(word for caption in captions for word in words(caption))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: max(vocab_size - 2, 0)], vocab_size, max_length)

    def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Token ids, padded with 0 on the right. Longer captions are cut, with one warning each."""
        if isinstance(captions, str):
            raise TypeError(f"expected a list of captions, got the string {captions!r}")
        tokens = np.full((len(captions), self.max_length), PAD, np.int32)
        for row, caption in zip(tokens, captions, strict=True):
            ids = [self._ids.get(word, UNK) for word in words(caption)]
            if len(ids) > self.max_length and caption not in self._cut:
                self._cut.add(caption)
                logger.warning(
                    "caption of %d words cut to max_length=%d: %r", len(ids), len(row), caption
                )
            row[: len(ids)] = ids[: self.max_length]
        return tokens

    def unknown_words(self, caption: str) -> list[str]:
        """The caption's words that have no row of their own."""
        return [word for word in words(caption) if word not in self._ids]

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs, ready for JSON."""
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
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")


TOKENIZERS = {"word": WordTokenizer}


def load_tokenizer(path: str | Path) -> WordTokenizer:
    """Read a saved tokenizer of any kind; ValueError names a file that is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = data["kind"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a tokenizer file: {type(e).__name__}: {e}") from None
    tokenizer = lookup(TOKENIZERS, kind, f"tokenizer kind in {path}")
    try:
        return tokenizer.from_dict(data)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not a tokenizer file: {type(e).__name__}: {e}") from None
