"""Functions of all tokenizers: rows of fixed length, warnings for captions that are cut, JSON."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

logger = logging.getLogger(__name__)

MOST_NAMED = 1000  # most captions for which a tokenizer warns that they are cut
MOST_WORDS = 1 << 16  # most words whose pieces a tokenizer keeps


class reading_as:
    """Turn the exceptions of reading a wrong file into a ValueError of one line: PATH is KIND: …

    kind: such as "no CLIP tokenizer".
    """

    def __init__(self, path: str | Path, kind: str):
        self._path, self._kind = path, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError | TypeError | AttributeError):
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self._path} is {self._kind}: {reason}") from None


class Piece(NamedTuple):
    """A token of a caption: its id, and its text."""

    id: int
    text: str


def fill_rows(
    captions: Sequence[str],
    pieces_of: Callable[[str], list[Piece]],
    max_length: int,
    pad: int,
    cut: set[str],
    *,
    start: Sequence[int] = (),
    end: Sequence[int] = (),
    join: Callable[[Sequence[str]], str] = " ".join,
) -> Int[np.ndarray, "N L"]:
    """Return rows [start, caption, end, pad …]; a caption that is too long loses its last tokens.

    cut: captions for which a warning was logged; this call adds others to it, MOST_NAMED at most.
    join: makes the text of the lost pieces, for the warning.
    """
    if isinstance(captions, str):
        raise TypeError(f"expected a list of captions, got the string {captions!r}")
    tokens = np.full((len(captions), max_length), pad, np.int32)
    room = max_length - len(start) - len(end)
    for row, caption in zip(tokens, captions, strict=True):
        pieces = pieces_of(caption)
        if len(pieces) > room and len(cut) < MOST_NAMED and caption not in cut:
            cut.add(caption)
            logger.warning(
                "caption of %d tokens cut to %d (max_length=%d), lost: %r",
                len(pieces),
                room,
                max_length,
                join([piece.text for piece in pieces[room:]]),
            )
        ids = [*start, *(piece.id for piece in pieces[:room]), *end]
        row[: len(ids)] = ids
    return tokens


def check_length(max_length: int, least: int) -> None:
    """Raise ValueError for rows that are too short for the tokens of every row."""
    if max_length < least:
        raise ValueError(f"max_length must be at least {least}, got {max_length}")


def write_json(tokenizer: Any, path: str | Path) -> None:
    """Write a tokenizer's `to_dict()` and its added words as a file for `load_tokenizer`."""
    content: dict[str, Any] = tokenizer.to_dict()
    if tokenizer.added:
        content = {**content, "added": {word: list(ids) for word, ids in tokenizer.added.items()}}
    Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
