"""The normalisation in files of sentencepiece models: characters and their replacements.

A charsmap is the length of a trie in bytes, the trie, and texts that end in a zero byte. The trie
is a double array (Yata et al.'s darts-clone) whose values are positions of texts. The rules for
clusters of several characters are those of the tokenizers library, which transformers uses.
"""

import itertools
import unicodedata
from collections.abc import Iterator

import numpy as np

_SHORT = 6  # bytes; shorter clusters of characters are looked up as a whole
_JOINERS = "\u200c\u200d"
_SKIN = range(0x1F3FB, 0x1F400)  # skin tones, which modify the character before


class Charsmap:
    """Replaces characters of a text; empty data change nothing.

    Raises ValueError for data that are shorter than their header says.
    """

    def __init__(self, data: bytes = b""):
        size = int.from_bytes(data[:4], "little")
        if size % 4 or (data and len(data) < 4 + size):
            raise ValueError("a damaged precompiled_charsmap")
        self._units = np.frombuffer(data, "<u4", size // 4, 4).tolist() if size else []
        self._texts = data[4 + size :]

    def __call__(self, text: str) -> str:
        """The text with its characters replaced."""
        if not self._units:
            return text
        parts = []
        for cluster in _clusters(text):
            whole = self._replacement(cluster) if len(cluster.encode()) < _SHORT else None
            if whole is None:
                for character in cluster:
                    new = self._replacement(character)
                    parts.append(character if new is None else new)
            else:
                parts.append(whole)
        return "".join(parts)

    def _replacement(self, text: str) -> str | None:
        """The replacement of the shortest beginning of `text` in the trie; None without one."""
        units, place = self._units, _offset(self._units[0])
        for byte in text.encode("utf-8", "surrogatepass"):
            place ^= byte
            if byte == 0 or place >= len(units) or units[place] & 0x800000FF != byte:
                return None
            leaf = units[place] >> 8 & 1
            place ^= _offset(units[place])
            if leaf:
                start = units[place] & 0x7FFFFFFF
                return self._texts[start : self._texts.index(0, start)].decode()
        return None


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _clusters(text: str) -> Iterator[str]:
    """Characters, each with the marks that follow it; "\\r\\n" is one cluster."""
    cluster = ""
    for character, following in itertools.pairwise([*text, ""]):
        cluster += character
        if not (_extends(following) or (character, following) == ("\r", "\n")):
            yield cluster
            cluster = ""


def _extends(character: str) -> bool:
    """Whether a character belongs to the one before."""
    return bool(character) and (
        unicodedata.category(character)[0] == "M"
        or character in _JOINERS
        or ord(character) in _SKIN
    )
