"""The tokenizers of Stable Diffusion 3: a row of CLIP's tokens, then T5's."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.data.tokenizers.added import Words
from latent_diffusion.data.tokenizers.clip import ClipTokenizer
from latent_diffusion.data.tokenizers.rows import write_json
from latent_diffusion.data.tokenizers.t5 import T5Tokenizer


class ClipT5Tokenizer:
    """[start, pieces, end, padding …] of CLIP, [pieces, end, padding …] of T5.

    Attributes: max_length, L of both rows together; vocab_size, empty and pad_id, those of CLIP
    (`of_encoder` returns the tokenizer of each encoder).
    """

    kind = "clip_t5"
    added: Words = MappingProxyType({})  # none: a word would need rows of three encoders

    def __init__(self, clip: ClipTokenizer, t5: T5Tokenizer):
        if clip.added:
            raise ValueError(f"CLIP's tokenizer adds {next(iter(clip.added))!r}: not beside T5's")
        self.clip, self.t5 = clip, t5
        self.max_length = clip.max_length + t5.max_length
        self.vocab_size, self.empty, self.pad_id = clip.vocab_size, clip.empty, clip.pad_id

    @classmethod
    def read(cls, path: str | Path, max_length: int | None = None) -> "ClipT5Tokenizer":
        """Read the folders tokenizer and tokenizer_3 of a pipeline of diffusers.

        max_length: that of both rows together. A ValueError names a path without them.
        """
        clip = ClipTokenizer.read(Path(path) / "tokenizer")
        rest = None if max_length is None else max_length - clip.max_length
        if rest is not None and rest < 1:
            raise ValueError(
                f"tokenizer.max_length={max_length} leaves no room for T5 behind CLIP's "
                f"{clip.max_length} tokens"
            )
        return cls(clip, T5Tokenizer.read(Path(path) / "tokenizer_3", rest))

    def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Token ids."""
        return np.concatenate([self.clip(captions), self.t5(captions)], axis=1)

    def unknown_words(self, caption: str) -> list[str]:
        """The texts of a caption that are unknown to T5's tokenizer."""
        return self.t5.unknown_words(caption)

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `from_dict`, for JSON."""
        return {"kind": self.kind, "clip": self.clip.to_dict(), "t5": self.t5.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ClipT5Tokenizer":
        """The inverse of `to_dict`."""
        return cls(ClipTokenizer.from_dict(data["clip"]), T5Tokenizer.from_dict(data["t5"]))

    def save(self, path: str | Path) -> None:
        """Write JSON that `load_tokenizer` reads."""
        write_json(self, path)


def of_encoder(tokenizer: Any, name: str) -> Any:
    """The tokenizer whose token ids the text encoder `name` reads."""
    if not isinstance(tokenizer, ClipT5Tokenizer):
        return tokenizer
    return tokenizer.t5 if name == "t5_text" else tokenizer.clip
