"""CLIP's byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021), as its checkpoints need.

Lower-cased words are written in bytes, and pairs of neighbours are merged in the order in which
they were learned. The vocabulary comes from files: those of a `tokenizer` folder of diffusers
(vocab.json and merges.txt, or tokenizer.json), or the merges that CLIP's own packages ship
(bpe_simple_vocab_16e6.txt.gz).
"""

import gzip
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.data.tokenizers.rows import Piece, check_length, fill_rows, write_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_END = "</w>"  # marks the last piece of a word
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_NUM_MERGES = 49152 - 256 - 2  # what CLIP uses of its file of merges
_LONGEST = 1 << 16  # a length beyond it in a file of settings stands for "unlimited"

# Every byte as a printable character, in the order of the vocabulary's first rows.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE}
BYTE_CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTE = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def _kind(character: str) -> str:
    """Which characters a word is made of: letters "L", single numbers "N", or signs "S"."""
    kind = unicodedata.category(character)[0]
    return kind if kind in "LN" else "S"


def split_words(text: str) -> Iterator[str]:
    """Contractions, runs of letters, single numerals, runs of anything else that is no space."""
    for chunk in _SPACES.split(text):
        i = 0
        while i < len(chunk):
            short = next((c for c in _CONTRACTIONS if chunk.startswith(c, i)), None)
            end = i + 1
            if short is not None:
                end = i + len(short)
            elif (kind := _kind(chunk[i])) != "N":
                while end < len(chunk) and _kind(chunk[end]) == kind:
                    end += 1
            yield chunk[i:end]
            i = end


class ClipTokenizer:
    """[start, pieces, end, padding …]: ids of a CLIP text encoder.

    vocabulary: the token of every id. merges: pairs "a b", the first learned first. max_length:
    tokens a caption, both ends included. pad: the token that fills a row: the end again (CLIP,
    Stable Diffusion 1) or "!" (Stable Diffusion 2). Ends and padding written out in a caption
    count as such.
    """

    kind = "clip"

    def __init__(
        self, vocabulary: Sequence[str], merges: Sequence[str], max_length: int = 77, pad: str = EOS
    ):
        check_length(max_length, 2)
        self.vocabulary, self.merges = tuple(vocabulary), tuple(merges)
        self.max_length, self.pad = max_length, pad
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        for token in (BOS, EOS, pad):
            if token not in self._ids:
                raise ValueError(f"the vocabulary has no {token!r}")
        self._ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(self.merges)}
        self._special = re.compile("(" + "|".join(map(re.escape, {BOS, EOS, pad})) + ")")
        self._cut: set[str] = set()  # captions warned about
        self._known: dict[str, list[Piece]] = {}  # words met before

    @classmethod
    def read(
        cls, path: str | Path, max_length: int | None = None, pad: str | None = None
    ) -> "ClipTokenizer":
        """From a pipeline of diffusers, a folder of a tokenizer, or one of their files.

        max_length, pad: None is what the folder says, or 77 and the end token. Raises ValueError
        that names the path where there is no such tokenizer.
        """
        path = Path(path)
        if (path / "tokenizer").is_dir():
            path = path / "tokenizer"
        try:
            vocabulary, merges = _read_files(path)
            said = _read_settings(path)
            return cls(vocabulary, merges, max_length or said["max_length"], pad or said["pad"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is no CLIP tokenizer: {type(e).__name__}: {e}") from None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return len(self.vocabulary)

    @property
    def empty(self) -> tuple[int, ...]:
        """Tokens of the empty prompt, before its padding."""
        return self._ids[BOS], self._ids[EOS]

    @property
    def pad_id(self) -> int:
        """The id that fills a row."""
        return self._ids[self.pad]

    def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Token ids. Longer captions are cut, with one warning each that says what was lost."""
        return fill_rows(
            captions,
            self._pieces,
            self.max_length,
            self.pad_id,
            self._cut,
            start=self.empty[:1],
            end=self.empty[1:],
            join=_as_text,
        )

    def unknown_words(self, caption: str) -> list[str]:
        """None: whatever can be written has bytes, and every byte has a row."""
        return []

    def _pieces(self, caption: str) -> list[Piece]:
        pieces: list[Piece] = []
        for part in self._special.split(caption):
            if self._special.fullmatch(part):
                pieces.append(Piece(self._ids[part], part))
                continue
            # Letter by letter: a final sigma stays a sigma.
            lower = "".join(c.lower() for c in unicodedata.normalize("NFC", part))
            for word in split_words(lower):
                if word not in self._known:
                    self._known[word] = self._merge(word)
                pieces += self._known[word]
        return pieces

    def _merge(self, word: str) -> list[Piece]:
        symbols = [BYTE_CHARACTERS[byte] for byte in word.encode()]
        symbols[-1] += _END
        never = len(self._ranks)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            first = min(pairs, key=lambda pair: self._ranks.get(pair, never))
            if first not in self._ranks:
                break
            merged, i = [], 0
            while i < len(symbols):
                both = i < len(pairs) and pairs[i] == first
                merged.append("".join(first) if both else symbols[i])
                i += 2 if both else 1
            symbols = merged
        return [Piece(self._ids.get(symbol, self._ids[EOS]), symbol) for symbol in symbols]

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs, ready for JSON."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "pad": self.pad,
            "vocabulary": list(self.vocabulary),
            "merges": list(self.merges),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ClipTokenizer":
        """The inverse of `to_dict`."""
        return cls(data["vocabulary"], data["merges"], data["max_length"], data["pad"])

    def save(self, path: str | Path) -> None:
        """Write JSON that `load_tokenizer` reads."""
        write_json(self.to_dict(), path)


def _as_text(symbols: Sequence[str]) -> str:
    """What some pieces say; bytes that are no characters show as such."""
    spaced = "".join(f" {s} " if s in (BOS, EOS) else s.replace(_END, " ") for s in symbols)
    data = b"".join(bytes([_BYTE[c]]) if c in _BYTE else c.encode() for c in spaced)
    return data.decode(errors="replace").strip()


def _read_files(path: Path) -> tuple[list[str], list[str]]:
    """Vocabulary and merges."""
    if path.name.endswith(".gz"):
        return _from_merges(gzip.decompress(path.read_bytes()).decode().split("\n"))
    single = path if path.is_file() else path / "tokenizer.json"
    if path.is_file() or not (path / "vocab.json").is_file():
        data = json.loads(single.read_text(encoding="utf-8"))
        ids = dict(data["model"]["vocab"])
        ids |= {token["content"]: token["id"] for token in data.get("added_tokens", ())}
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        return _by_id(ids), merges
    ids = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    return _by_id(ids), [line for line in lines if line and not line.startswith("#version")]


def _from_merges(lines: list[str]) -> tuple[list[str], list[str]]:
    """CLIP's vocabulary follows from its merges: bytes, bytes at a word's end, merged pairs."""
    merges = [line for line in lines[1:] if line][:_NUM_MERGES]
    single = list(BYTE_CHARACTERS.values())
    joined = [pair.replace(" ", "") for pair in merges]
    return [*single, *(c + _END for c in single), *joined, BOS, EOS], merges


def _by_id(ids: dict[str, int]) -> list[str]:
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the ids of its vocabulary are not 0, 1, 2 …")
    return tokens


def _read_settings(path: Path) -> dict[str, Any]:
    """max_length and pad as the files beside the vocabulary say."""
    said: dict[str, Any] = {"max_length": 77, "pad": EOS}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the last one wins
        file = path / name
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("model_max_length", _LONGEST) < _LONGEST:
            said["max_length"] = content["model_max_length"]
        if content.get("pad_token"):
            token = content["pad_token"]
            said["pad"] = token["content"] if isinstance(token, dict) else token
    return said
