"""Read, write and apply textual inversion (Gal et al. 2022): embeddings of new words.

A word has one vector or several, which follow each other in the prompt. For a model with two text
encoders a word has vectors of both.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import numpy as np

from latent_diffusion.convert.adapters.adapter import Adapter, Rows
from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.files.tensor import TensorFile, in_memory, is_float
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.nets.conditioners import CONDITIONERS, tables

_A1111 = ("string_to_param.*", "emb_params")  # tensors in their .pt and .safetensors files
_SDXL = ("clip_l", "clip_g")
_ANOTHERS = {"clip_text": "clip_g", "clip_text_2": "clip_l"}  # encoder -> vectors of the other one


class Words(Adapter):
    """A new word, as prompts spell it; vectors: [n width] for each text encoder, by its name.

    The names are "" for the only text encoder, "clip_l" and "clip_g" for the two of SDXL, or those
    of conditioners.
    """

    word: str = flax.struct.field(pytree_node=False)
    vectors: Mapping[str, Any]

    @property
    def count(self) -> int:
        """The number of vectors of the word."""
        return int(next(iter(self.vectors.values())).shape[0])

    def changes(self, bundle: Bundle) -> dict[str, Any]:
        """See `Adapter`: rows that are appended to the embedding tables of the text encoders."""
        changes: dict[str, Any] = {}
        left = dict(self.vectors)
        for name, part, table in tables_of(bundle):
            width = part.params[table].shape[1]
            keys = [k for k in left if k in ("", name, *_SDXL) and k != _ANOTHERS.get(name)]
            match = next((key for key in keys if left[key].shape[1] == width), None)
            if match is None:
                widths = ", ".join(str(rows.shape[1]) for rows in self.vectors.values())
                raise ValueError(
                    f"{self.path}: the word {self.word!r} has vectors of {widths} numbers, but "
                    f"those of {name} have {width}"
                )
            names = (f"text_encoder{'_2' if changes else ''}",)
            changes[f"conditioner/{name}/{table}"] = Rows(left.pop(match), names)
        if left:
            raise ValueError(
                f"{self.path}: {next(iter(left)) or 'vectors'} of the word {self.word!r} is for a "
                "text encoder that this model lacks"
            )
        return changes


def tables_of(bundle: Bundle) -> list[tuple[str, Part, str]]:
    """Name, part, and path of the embedding table of each text encoder of a model."""
    parts = bundle.conditioners
    return [(name, parts[name], table) for name, table in tables(parts).items()]


def is_words(file: TensorFile) -> bool:
    """Whether a file has embeddings of textual inversion."""
    names, shapes = [*file.tensors], [t.shape for t in file.tensors.values()]
    marks = {*_A1111, *_SDXL, *tables(CONDITIONERS)}
    if all(n in marks or n.startswith("string_to_param.") for n in names):
        return bool(names)
    # diffusers' files are {"<word>": vectors}; several words have vectors of one width.
    plain = all("." not in n or (n[0], n[-1]) == ("<", ">") for n in names)
    plain = plain and all(1 <= len(shape) <= 2 for shape in shapes)
    return plain and len({shape[-1] for shape in shapes}) == 1


def read_words(path: Path, file: TensorFile, word: str | None = None) -> Words:
    """The word in a file of diffusers, of A1111's web UI, or of SDXL.

    word: its spelling in prompts; None takes that in diffusers' file, or the file's name for the
    others, as their programs do. Raises ValueError for a file with two words.
    """
    vectors = {}
    for name, tensor in file.tensors.items():
        if not is_float(tensor.dtype) or len(tensor.shape) not in (1, 2) or not tensor.size:
            raise ValueError(f"{path}: {name} is {tensor.dtype} {tensor.shape}, not vectors [n D]")
        array = np.asarray(tensor.astype(np.float32).read())
        vectors[name] = array.reshape(-1, array.shape[-1])
    only = next(iter(vectors))
    if set(vectors) & {*_SDXL, *tables(CONDITIONERS)}:
        if len({len(rows) for rows in vectors.values()}) > 1:
            raise ValueError(f"{path}: its text encoders have different numbers of vectors")
        return Words(path=str(path), word=word or path.stem, vectors=vectors)
    if len(vectors) > 1:
        listed = ", ".join(vectors)[:200]
        raise ValueError(f"{path}: {len(vectors)} words in one file; give each its own: {listed}")
    named = path.stem if only in _A1111 or only.startswith("string_to_param.") else only
    return Words(path=str(path), word=word or named, vectors={"": vectors[only]})


def words_of(bundle: Bundle) -> list[Words]:
    """The words that were added to a model, with their vectors."""
    added = getattr(bundle.tokenizer, "added", {})
    words = []
    for word, ids in added.items():
        tables = tables_of(bundle)
        rows = {n: np.asarray(part.params[path].read())[list(ids)] for n, part, path in tables}
        if rows.keys() == {"clip_text", "clip_text_2"}:
            rows = dict(zip(_SDXL, rows.values(), strict=True))
        vectors = rows if len(rows) > 1 else {"": next(iter(rows.values()))}
        words.append(Words(path=word, word=word, vectors=vectors))
    return words


def own_word(bundle: Bundle) -> Words:
    """The only word that was added to a model. Raises ValueError where there are others."""
    words = words_of(bundle)
    if len(words) != 1:
        raise ValueError(
            f"this model has {len(words)} added words, and a file holds one: train it with "
            "textual_inversion.word"
        )
    return words[0]


def write_words(adapter: Words, path: Path, layout: str) -> None:
    """Write a word in the layout "diffusers" or "a1111" (where the file's name is the word).

    Both write "clip_l" and "clip_g" for two text encoders.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a word's file ends in .safetensors")
    if layout not in ("diffusers", "a1111"):
        raise ValueError(f"unknown layout {layout!r}; known: diffusers, a1111")
    single = adapter.word if layout == "diffusers" else "emb_params"
    arrays = {name or single: np.ascontiguousarray(x) for name, x in adapter.vectors.items()}
    write_safetensors(path, {name: in_memory(x) for name, x in arrays.items()})


def write_own(layout: str) -> Callable[..., None]:
    """A function that writes the only word that was added to a bundle, without the model."""

    def write(bundle: Bundle, path: Path, progress: Any = lambda count: None) -> None:
        write_words(own_word(bundle), path, layout)

    return write
