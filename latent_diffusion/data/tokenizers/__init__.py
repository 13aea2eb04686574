"""Tokenizers: from captions to token ids.

A tokenizer maps captions to int32 [N L] with a fixed L. It is saved beside the checkpoint, whose
embeddings have no meaning without it.
"""

import json
from pathlib import Path
from typing import Any

from latent_diffusion.core.types import lookup
from latent_diffusion.data.tokenizers.added import with_words
from latent_diffusion.data.tokenizers.bert import BertTokenizer
from latent_diffusion.data.tokenizers.clip import ClipTokenizer
from latent_diffusion.data.tokenizers.clip_t5 import ClipT5Tokenizer, of_encoder
from latent_diffusion.data.tokenizers.rows import reading_as
from latent_diffusion.data.tokenizers.t5 import T5Tokenizer
from latent_diffusion.data.tokenizers.word import WordTokenizer, words
from latent_diffusion.files.reading import read_text

__all__ = [
    "TOKENIZERS",
    "BertTokenizer",
    "ClipT5Tokenizer",
    "ClipTokenizer",
    "T5Tokenizer",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "of_encoder",
    "with_words",
    "words",
]

Tokenizer = WordTokenizer | ClipTokenizer | BertTokenizer | T5Tokenizer | ClipT5Tokenizer
TOKENIZERS: dict[str, Any] = {
    "word": WordTokenizer,
    "clip": ClipTokenizer,
    "bert": BertTokenizer,
    "t5": T5Tokenizer,
    "clip_t5": ClipT5Tokenizer,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a saved tokenizer of any kind; a ValueError names a file without a tokenizer."""
    with reading_as(path, "not a tokenizer file"):
        data = json.loads(read_text(Path(path)))
        kind = data["kind"]
    tokenizer = lookup(TOKENIZERS, kind, f"tokenizer kind in {path}")
    with reading_as(path, "not a tokenizer file"):
        return with_words(tokenizer.from_dict(data), data.get("added", {}))
