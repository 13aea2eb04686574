"""Words that are added to a tokenizer after the model's training (textual inversion)."""

import copy
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_diffusion.data.tokenizers.rows import Piece
from latent_diffusion.files.reading import MAX_TEXT, read_json

Words = Mapping[str, tuple[int, ...]]  # a word as prompts spell it -> the ids of its vectors


def with_words(tokenizer: Any, words: Mapping[str, Sequence[int]]) -> Any:
    """The tokenizer with further words, each of which becomes one id or several.

    A word is recognised alone, not within another word: "cat" isn't in "cats". Capitals matter.
    Raises ValueError for an empty word, and for a word that the tokenizer already has.
    """
    added = dict(tokenizer.added)
    for word, ids in words.items():
        if not word or word != word.strip():
            raise ValueError(f"{word!r} is no word: it is empty, or spaces are around it")
        if word in added or _is_token(tokenizer, word):
            raise ValueError(f"the word {word!r} exists already; give the new one another name")
        added[word] = tuple(int(i) for i in ids)
    more = copy.copy(tokenizer)
    more.added = added
    return more


def read_added(path: Path, special: Collection[str]) -> dict[str, list[int]]:
    """The words that a tokenizer's files add to its vocabulary, with their ids.

    path: a folder of transformers, or one of its files. special: tokens that aren't words, such as
    the start. Raises ValueError for a token with special rules for spaces or neighbours, with two
    ids, or without an id.
    """
    entries: list[tuple[str, Any, Mapping[str, Any]]] = []
    names: list[Any] = []
    if path.is_dir():
        config, roles, ids = (
            read_json(path / name) if (path / name).is_file() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        )
        entries += [(word, int(i), {}) for word, i in ids.items()]
        decoder = config.get("added_tokens_decoder") or {}
        entries += [(token["content"], int(i), token) for i, token in decoder.items()]
        for tokens in (config, roles):
            names += tokens.get("additional_special_tokens") or []
    single = path / "tokenizer.json" if path.is_dir() else path
    if single.suffix == ".json" and single.is_file():
        listed = read_json(single, MAX_TEXT).get("added_tokens") or []
        entries += [(token["content"], token["id"], token) for token in listed]
    words: dict[str, list[int]] = {}
    for word, i, flags in entries:
        rules = [name for name in ("single_word", "lstrip", "rstrip") if flags.get(name)]
        if word in special:
            continue
        if rules:
            raise ValueError(f"the added token {word!r} has {rules[0]}=true, which isn't supported")
        if words.setdefault(word, [i]) != [i]:
            raise ValueError(f"the added token {word!r} has two ids: {words[word][0]} and {i}")
    for name in names:
        word = name if isinstance(name, str) else name["content"]
        if word not in words and word not in special:
            raise ValueError(f"the additional special token {word!r} has no id in these files")
    return words


def _is_token(tokenizer: Any, word: str) -> bool:
    """Whether the word is a single token of the tokenizer's vocabulary."""
    pieces = tokenizer._pieces(word)
    alone = len(pieces) == 1 and pieces[0].text.removesuffix("</w>") == word.lower()
    return alone and not tokenizer.unknown_words(word)


def with_added(
    added: Words, pieces_of: Callable[[str], list[Piece]]
) -> Callable[[str], list[Piece]]:
    """The function `pieces_of`, extended to texts with added words."""
    if not added:
        return pieces_of
    pattern = _pattern(tuple(sorted(added, key=len, reverse=True)))

    def pieces(caption: str) -> list[Piece]:
        result = []
        for part in pattern.split(caption):
            if part in added:
                result += [Piece(i, part) for i in added[part]]
            else:
                result += pieces_of(part)
        return result

    return pieces


def without_added(added: Words, caption: str) -> str:
    """The caption with a space in the place of each added word."""
    return _pattern(tuple(added)).sub(" ", caption) if added else caption


@functools.lru_cache(maxsize=64)
def _pattern(words: tuple[str, ...]) -> re.Pattern:
    """A pattern of the words, as one group; no letter may follow a word that ends in a letter."""
    each = (
        (r"(?<!\w)" if re.match(r"\w", word) else "")
        + re.escape(word)
        + (r"(?!\w)" if re.search(r"\w$", word) else "")
        for word in words
    )
    return re.compile(f"({'|'.join(each)})")
