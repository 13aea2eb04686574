"""A small vocabulary of T5 for tests: pieces with scores, and a charsmap of darts-clone's form."""

import unicodedata

SPACE = "▁"
WORDS = """
    a red cat two dogs far away photo of the astronaut riding horse painting hello world it's
    naïve façade ﬁ Привет мир! 日本語 x² 12,345.6 quoted <pad> under_score
"""


def vocabulary():
    """[(piece, score)]: special tokens, letters of the words, and their parts, likelier if long."""
    letters = sorted({c for word in WORDS.split() for c in word})
    parts = {SPACE + word[:n] for word in WORDS.split() for n in range(1, len(word) + 1)}
    parts |= {
        word[i : i + n] for word in WORDS.split() for i in range(1, len(word)) for n in (2, 3, 5)
    }
    pieces = [SPACE, *letters, *sorted(parts - set(letters))]
    scores = {piece: -2.0 - (7 * i % 11) / len(piece) for i, piece in enumerate(pieces)}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return [*special, *scores.items(), ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]


def replacements():
    """Some of what sentencepiece's nmt_nfkc replaces: spaces, control signs, compatible forms."""
    told = {"\t": " ", "\n": " ", "\r": " ", "\u3000": " ", "\xa0": " ", "\x1f": "", "\u200b": " "}
    told |= {c: unicodedata.normalize("NFKC", c) for c in "ﬁ²½Ⅷ…ǅＡ"}
    return told | {d: unicodedata.normalize("NFC", d) for d in ("e\u0301", "A\u0300")}


def charsmap(changes):
    """The bytes of a file: a double array of the keys in UTF-8, then the texts."""
    texts, trie = b"", {}
    for key, text in changes.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[None] = len(texts)
        texts += text.encode() + b"\0"
    units, used = {}, {0}

    def lay(node, place, label):
        labels = [0 if byte is None else byte for byte in node]
        base = next(b for b in range(1, 1 << 20) if not used & {b ^ one for one in labels})
        used.update(base ^ one for one in labels)
        units[place] = label | (None in node) << 8 | (place ^ base) << 10
        for byte, below in node.items():
            if byte is None:
                units[base] = below | 1 << 31
            else:
                lay(below, base ^ byte, byte)

    lay(trie, 0, 0)
    size = (max(used) | 0xFF) + 1
    array = b"".join(units.get(i, 0).to_bytes(4, "little") for i in range(size))
    return len(array).to_bytes(4, "little") + array + texts


VOCABULARY = vocabulary()
CHARSMAP = charsmap(replacements())
