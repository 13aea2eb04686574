"""T5's tokenizer: the likeliest pieces of each word (Kudo 2018), from sentencepiece's files."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.data.tokenizers.added import Words, with_added
from latent_diffusion.data.tokenizers.charsmap import Charsmap
from latent_diffusion.data.tokenizers.clip import SPACES
from latent_diffusion.data.tokenizers.rows import (
    Piece,
    check_length,
    fill_rows,
    reading_as,
    write_json,
)
from latent_diffusion.files.reading import MAX_TEXT, read_json

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "▁"  # the beginning of every word
_PENALTY = 10.0  # score of an unknown character, below the least score of a piece
# Steps of normalisation and splitting that files may name.
_STEPS = ("Precompiled", "Strip", "Replace", "WhitespaceSplit", "Metaspace")
_LENGTH = 256


class T5Tokenizer:
    """[pieces, end, padding …]: the ids for a T5 text encoder.

    vocabulary: (piece, logarithm of its probability) of every id. charsmap: the normalisation, in
    base64; "" is none. special: tokens whose text in a caption becomes the token, with the spaces
    before or behind it for tokens that are in `before` or `behind`. max_length: L, with the end.
    Attributes: vocab_size, the number of ids; empty, the tokens of the empty prompt; pad_id, the id
    of the padding.
    """

    kind = "t5"
    added: Words = MappingProxyType({})  # see `with_words`

    def __init__(
        self,
        vocabulary: Sequence[tuple[str, float]],
        max_length: int = _LENGTH,
        charsmap: str = "",
        special: Sequence[str] = (PAD, EOS, UNK),
        before: Sequence[str] = (),
        behind: Sequence[str] = (),
    ):
        check_length(max_length, 1)
        self.vocabulary = tuple((piece, float(score)) for piece, score in vocabulary)
        self.max_length, self.charsmap = max_length, charsmap
        self.special, self.before, self.behind = tuple(special), tuple(before), tuple(behind)
        self._ids = {piece: i for i, (piece, _) in enumerate(self.vocabulary)}
        self._scores = dict(self.vocabulary)
        for token in (*special, PAD, EOS, UNK):
            if token not in self._ids:
                raise ValueError(f"the vocabulary has no {token!r}")
        self.vocab_size = len(self.vocabulary)
        self.empty, self.pad_id = (self._ids[EOS],), self._ids[PAD]
        self._longest = max(map(len, self._ids))
        self._unknown = min(self._scores.values()) - _PENALTY
        self._normalised = Charsmap(base64.b64decode(charsmap))
        patterns = [
            (r"\s*" if t in before else "") + re.escape(t) + (r"\s*" if t in behind else "")
            for t in sorted(special, key=len, reverse=True)
        ]
        self._special = re.compile(f"({'|'.join(patterns) or '(?!)'})")
        self._cut: set[str] = set()  # captions for which a warning was logged

    @classmethod
    def read(cls, path: str | Path, max_length: int | None = None) -> "T5Tokenizer":
        """Read a pipeline of diffusers, a tokenizer's folder, or its tokenizer.json.

        Raises ValueError that names a path without such a tokenizer.
        """
        path = Path(path)
        for name in ("tokenizer_3", "tokenizer"):
            path = path / name if (path / name).is_dir() else path
        with reading_as(path, "no T5 tokenizer"):
            single = path / "tokenizer.json" if path.is_dir() else path
            if path.is_dir() and not single.is_file() and (path / "spiece.model").is_file():
                raise ValueError(
                    "it has a spiece.model alone; save it with transformers, which writes a "
                    "tokenizer.json"
                )
            return cls(max_length=max_length or _LENGTH, **_read(read_json(single, MAX_TEXT)))

    def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Token ids. A caption that is too long is cut, and a warning quotes the lost part."""
        return fill_rows(
            captions,
            with_added(self.added, self._pieces),
            self.max_length,
            self.pad_id,
            self._cut,
            end=self.empty,
            join=lambda pieces: "".join(pieces).replace(SPACE, " ").strip(),
        )

    def unknown_words(self, caption: str) -> list[str]:
        """The texts of a caption that can't be composed of pieces."""
        pieces = with_added(self.added, self._pieces)(caption)
        return [piece.text for piece in pieces if piece.id == self._ids[UNK]]

    def _pieces(self, caption: str) -> list[Piece]:
        pieces: list[Piece] = []
        for part in self._special.split(caption):
            if self._special.fullmatch(part):
                token = part if part in self._ids else part.strip()
                pieces.append(Piece(self._ids[token], token))
                continue
            for word in SPACES.split(self._normalised(part)):
                if word:
                    spaced = word if word[0] == SPACE else SPACE + word
                    for text in re.findall(f"{SPACE}[^{SPACE}]*", spaced):
                        pieces += self._likeliest(text)
        return pieces

    def _likeliest(self, text: str) -> list[Piece]:
        """The pieces with the largest sum of scores (Viterbi's algorithm).

        Neighbouring unknown pieces become one piece.
        """
        # For each end: the sum of scores of the best pieces up to it, and the last piece's start.
        best: list[tuple[float, int] | None] = [(0.0, 0)] + [None] * len(text)
        for start in range(len(text)):
            sofar = best[start]
            assert sofar is not None  # each character is a piece, perhaps an unknown one
            for end in range(start + 1, min(len(text), start + self._longest) + 1):
                score = self._scores.get(text[start:end])
                if score is None and end == start + 1:
                    score = self._unknown
                previous = best[end]
                if score is not None and (previous is None or sofar[0] + score > previous[0]):
                    best[end] = (sofar[0] + score, start)
        pieces: list[Piece] = []
        end, unknown = len(text), self._ids[UNK]
        while end:
            start = best[end][1]  # type: ignore[index]
            piece = Piece(self._ids.get(text[start:end], unknown), text[start:end])
            if piece.id == unknown and pieces and pieces[-1].id == unknown:
                pieces[-1] = Piece(unknown, piece.text + pieces[-1].text)
            else:
                pieces.append(piece)
            end = start
        return pieces[::-1]

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `from_dict`, for JSON."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "charsmap": self.charsmap,
            "special": list(self.special),
            "before": list(self.before),
            "behind": list(self.behind),
            "vocabulary": [list(entry) for entry in self.vocabulary],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "T5Tokenizer":
        """The inverse of `to_dict`."""
        fields = {name: value for name, value in data.items() if name not in ("kind", "added")}
        return cls(**{**fields, "vocabulary": [(piece, p) for piece, p in fields["vocabulary"]]})

    def save(self, path: str | Path) -> None:
        """Write JSON that `load_tokenizer` reads."""
        write_json(self, path)


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `T5Tokenizer`, except max_length, from the content of a tokenizer.json."""
    model = data["model"]
    if model.get("type") != "Unigram" or model.get("byte_fallback"):
        raise ValueError(f"a model {model.get('type')!r}; supported: Unigram without byte_fallback")
    vocabulary = [tuple(entry) for entry in model["vocab"]]
    if vocabulary[model["unk_id"]][0] != UNK:
        raise ValueError(f"unk_id={model['unk_id']} isn't {UNK}")
    charsmap = ""
    for step in [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]:
        if step["type"] not in _STEPS:
            raise ValueError(f"a step {step['type']!r}; supported: {', '.join(_STEPS)}")
        charsmap = step.get("precompiled_charsmap") or charsmap
    tokens = data.get("added_tokens") or []
    rules = {name: [t["content"] for t in tokens if t.get(name)] for name in _RULES}
    if rules["single_word"] or rules["normalized"]:
        name = next(name for name in ("single_word", "normalized") if rules[name])
        raise ValueError(f"the token {rules[name][0]!r} has {name}=true, which isn't supported")
    return {
        "vocabulary": vocabulary,
        "charsmap": charsmap,
        "special": [token["content"] for token in tokens] or [PAD, EOS, UNK],
        "before": rules["lstrip"],
        "behind": rules["rstrip"],
    }


_RULES = ("single_word", "normalized", "lstrip", "rstrip")


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre_tokenizer as a list of single steps."""
    if step is None:
        return []
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [step] if inner is None else [single for part in inner for single in _steps(part)]
