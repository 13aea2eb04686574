"""CLIP's byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021).

Lower-case words become bytes, and neighbouring pieces are merged in the order in which the pairs
were learned. The vocabulary comes from files: those of a `tokenizer` folder of diffusers
(vocab.json and merges.txt, or tokenizer.json), or the merges of the packages of CLIP
(bpe_simple_vocab_16e6.txt.gz).
"""

import itertools
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latent_diffusion.data.tokenizers.added import Words, read_added, with_added, with_words
from latent_diffusion.data.tokenizers.rows import (
    MOST_WORDS,
    Piece,
    check_length,
    fill_rows,
    reading_as,
    write_json,
)
from latent_diffusion.data.tokenizers.weights import parse
from latent_diffusion.files.reading import MAX_TEXT, read_gzip, read_json, read_text

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_END = "</w>"  # marks the last piece of a word
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_NUM_MERGES = 49152 - 256 - 2  # CLIP uses this number of its file's merges
_ROLES = ("bos", "eos", "unk", "pad")
_LONGEST = 1 << 16  # a greater length in a file of settings means "unlimited"

# A printable character for every byte, in the order of the vocabulary's first rows.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE}
BYTE_CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTE = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def _kind(character: str) -> str:
    """The kind of a character: letter "L", numeral "N" or sign "S". Words have one kind."""
    kind = unicodedata.category(character)[0]
    return kind if kind in "LN" else "S"


def split_words(text: str) -> Iterator[str]:
    """Split into contractions, runs of letters, single numerals, and runs of other signs."""
    for chunk in SPACES.split(text):
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
    """[start, pieces, end, padding …]: the ids for a CLIP text encoder.

    vocabulary: the token of every id. merges: pairs "a b" in the order in which they were learned.
    max_length: L, with start and end. pad: the token of the padding, the end token (CLIP, Stable
    Diffusion 1) or "!" (Stable Diffusion 2). The text of the start, end or padding token in a
    caption becomes that token; for tokens in `any_case`, also in capitals. Attributes: vocab_size,
    the number of ids; empty, the tokens of the empty prompt; pad_id, the id of the padding.
    """

    kind = "clip"
    added: Words = MappingProxyType({})  # see `with_words`

    def __init__(
        self,
        vocabulary: Sequence[str],
        merges: Sequence[str],
        max_length: int = 77,
        pad: str = EOS,
        any_case: Sequence[str] = (),
    ):
        check_length(max_length, 2)
        self.vocabulary, self.merges = tuple(vocabulary), tuple(merges)
        self.max_length, self.pad = max_length, pad
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        for token in (BOS, EOS, pad):
            if token not in self._ids:
                raise ValueError(f"the vocabulary has no {token!r}")
        self.vocab_size = len(self.vocabulary)
        self.empty, self.pad_id = (self._ids[BOS], self._ids[EOS]), self._ids[pad]
        self._ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(self.merges)}
        self.any_case = tuple(sorted({BOS, EOS, pad} & set(any_case)))
        exact = {BOS, EOS, pad} - set(self.any_case)
        # Tokens to find in the text as it is, and in the lower-case text, where the texts of start
        # and end separate words even if they don't become the tokens.
        self._exact, self._lower = _any_of(exact), _any_of({BOS, EOS, *self.any_case})
        self._cut: set[str] = set()  # captions for which a warning was logged
        self._merged: dict[str, list[Piece]] = {}  # the pieces of earlier words

    @classmethod
    def read(
        cls, path: str | Path, max_length: int | None = None, pad: str | None = None
    ) -> "ClipTokenizer":
        """Read a pipeline of diffusers, a folder of a tokenizer, or one of their files.

        max_length: None takes the folder's settings, or 77. pad: the padding where no file names
        one, by default the end token. Raises ValueError that names a path without such a tokenizer.
        """
        path = Path(path)
        if (path / "tokenizer").is_dir():
            path = path / "tokenizer"
        with reading_as(path, "no CLIP tokenizer"):
            length, padding, any_case = _read_settings(path, pad or EOS)
            added = read_added(path, {BOS, EOS, padding})
            vocabulary, merges = _read_files(path, added)
            plain = cls(vocabulary, merges, max_length or length, padding, any_case)
            tokenizer: ClipTokenizer = with_words(plain, added)
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
            join=_as_text,
        )

    def chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """Tokens with weights (see module `weights`), in chunks that fit between start and end."""
        chunks, room = [], self.max_length - 2
        pieces_of = with_added(self.added, self._pieces)
        for section in parse(prompt):
            tokens = [(piece.id, weight) for text, weight in section for piece in pieces_of(text)]
            chunks += [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]
        return chunks

    def weighted(
        self, prompts: Sequence[str], num_chunks: int
    ) -> tuple[Int[np.ndarray, "N nL"], Float[np.ndarray, "N nL"]]:
        """Token ids and weights of prompts of any length, in num_chunks rows of L each.

        Start, end and padding have weight 1. Chunks that a prompt doesn't fill are empty prompts.
        """
        (start, end), shape = self.empty, (len(prompts), num_chunks, self.max_length)
        tokens, weights = np.full(shape, self.pad_id, np.int32), np.ones(shape, np.float32)
        tokens[:, :, 0], tokens[:, :, 1] = start, end
        for i, prompt in enumerate(prompts):
            for j, chunk in enumerate(self.chunks(prompt)):
                tokens[i, j, 1 : len(chunk) + 2] = [*(token for token, _ in chunk), end]
                weights[i, j, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
        return tokens.reshape(len(prompts), -1), weights.reshape(len(prompts), -1)

    def unknown_words(self, caption: str) -> list[str]:
        """No word is unknown: every text consists of bytes, and every byte has an id."""
        return []

    def _pieces(self, caption: str) -> list[Piece]:
        pieces: list[Piece] = []
        for part in self._exact.split(caption):
            if self._exact.fullmatch(part):
                pieces.append(Piece(self._ids[part], part))
                continue
            # Letters are made lower-case one by one, so that a final sigma becomes a plain sigma.
            lower = "".join(c.lower() for c in unicodedata.normalize("NFC", part))
            for text in self._lower.split(lower):
                if text in self.any_case:
                    pieces.append(Piece(self._ids[text], text))
                    continue
                for word in split_words(text):
                    pieces_of = self._merged.get(word)
                    if pieces_of is None:
                        if len(self._merged) >= MOST_WORDS:
                            self._merged = {}  # other threads may read the old one
                        self._merged[word] = pieces_of = self._merge(word)
                    pieces += pieces_of
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
        """The arguments of `from_dict`, for JSON."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "pad": self.pad,
            "any_case": list(self.any_case),
            "vocabulary": list(self.vocabulary),
            "merges": list(self.merges),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ClipTokenizer":
        """The inverse of `to_dict`."""
        settings = (data["max_length"], data["pad"], data.get("any_case", ()))
        return cls(data["vocabulary"], data["merges"], *settings)

    def save(self, path: str | Path) -> None:
        """Write JSON that `load_tokenizer` reads."""
        write_json(self, path)


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """A pattern of the tokens, as a group, so that `split` returns them, too."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens))) or r"(?!)") + ")")


def _as_text(symbols: Sequence[str]) -> str:
    """The text of pieces; bytes that aren't UTF-8 become replacement characters."""
    spaced = "".join(f" {s} " if s in (BOS, EOS) else s.replace(_END, " ") for s in symbols)
    data = b"".join(bytes([_BYTE[c]]) if c in _BYTE else c.encode() for c in spaced)
    return data.decode(errors="replace").strip()


def _read_files(path: Path, added: Container[str]) -> tuple[list[str], list[str]]:
    """The vocabulary, without the added words, and the merges."""
    if path.name.endswith(".gz"):
        return _from_merges(read_gzip(path).split("\n"))
    single = path if path.is_file() else path / "tokenizer.json"
    if path.is_file() or not (path / "vocab.json").is_file():
        data = read_json(single, MAX_TEXT)
        ids = dict(data["model"]["vocab"])
        more = {token["content"]: token["id"] for token in data.get("added_tokens", ())}
        ids |= {token: i for token, i in more.items() if token not in added}
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        return _by_id(ids), merges
    ids = read_json(path / "vocab.json", MAX_TEXT)
    lines = read_text(path / "merges.txt").split("\n")
    return _by_id(ids), [line for line in lines if line and not line.startswith("#version")]


def _from_merges(lines: list[str]) -> tuple[list[str], list[str]]:
    """CLIP's vocabulary (bytes, bytes at the end of a word, merged pairs), and its merges."""
    merges = [line for line in lines[1:] if line][:_NUM_MERGES]
    single = list(BYTE_CHARACTERS.values())
    joined = [pair.replace(" ", "") for pair in merges]
    return [*single, *(c + _END for c in single), *joined, BOS, EOS], merges


def _by_id(ids: dict[str, int]) -> list[str]:
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the ids of its vocabulary are not 0, 1, 2 …")
    return tokens


def _read_settings(path: Path, usual: str) -> tuple[int, str, list[str]]:
    """max_length, pad and any_case in files beside the vocabulary; default: 77, `usual`, none."""
    config, special = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    length = min(
        config.get("model_max_length", _LONGEST), special.get("model_max_length", _LONGEST)
    )
    tokens = [*config.get("added_tokens_decoder", {}).values()]
    single = path if path.suffix == ".json" else path / "tokenizer.json"
    if not tokens and single.is_file():
        tokens = read_json(single, MAX_TEXT).get("added_tokens", [])
    roles = {**config, **special}  # the last file takes precedence
    pad = roles.get("pad_token") or usual
    tokens = tokens or [roles[f"{role}_token"] for role in _ROLES if roles.get(f"{role}_token")]
    any_case: dict[str, bool] = {}
    for token in tokens:  # a token that has several roles has the flag in each of them
        name, flag = _flagged(token)
        any_case[name] = flag and any_case.get(name, True)
    names = [name for name, flag in any_case.items() if flag]
    return length if length < _LONGEST else 77, _flagged(pad)[0], names


def _flagged(token: str | Mapping[str, Any]) -> tuple[str, bool]:
    """A token in a file of settings, and whether it is searched for in the lower-case text."""
    if isinstance(token, str):
        return token, False
    return token["content"], bool(token.get("normalized", False))
