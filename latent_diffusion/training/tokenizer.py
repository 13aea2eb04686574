"""The tokenizer of a run: built from the training captions, or read from files."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.data.tokenizers import TOKENIZERS, Tokenizer, WordTokenizer, load_tokenizer
from latent_diffusion.nets.conditioners import Conditioner, make_conditioner
from latent_diffusion.runtime import processes
from latent_diffusion.runtime.workdir import TOKENIZER, whole
from latent_diffusion.types import lookup


def make_tokenizer(config: ConfigDict, workdir: Path, source: Any) -> Tokenizer | None:
    """The workdir's tokenizer, made the first time: read from files, or from the captions."""
    own = config.tokenizer
    if own.name == "none":
        return None
    kind = lookup(TOKENIZERS, own.name, "tokenizer.name")
    if jax.process_index() == 0 and not (workdir / TOKENIZER).exists():
        if kind is WordTokenizer:
            made = kind.train(data.captions(source), own.vocab_size, own.max_length)
        elif not own.path:
            raise ValueError(f"tokenizer.name={own.name!r} needs tokenizer.path: its files")
        else:
            made = kind.read(own.path, own.max_length)
        with whole(workdir / TOKENIZER) as partial:
            made.save(partial)
    processes.barrier("tokenizer")
    tokenizer = load_tokenizer(workdir / TOKENIZER)
    check_reads(make_conditioner(config.conditioners), tokenizer)
    return tokenizer


def check_reads(conditioner: Conditioner, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a text encoder that would misread this tokenizer's numbers."""
    for name, part in zip(conditioner.config, conditioner.parts(), strict=True):
        if "tokens" not in part.keys:
            continue
        if part.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"conditioners.{name}.vocab_size={part.vocab_size}, "
                f"but the tokenizer has {tokenizer.vocab_size} tokens"
            )
        for field in ("empty", "pad_id"):
            wanted = getattr(tokenizer, field)
            own = getattr(part, field, wanted)
            own = tuple(own) if isinstance(own, list) else own  # as JSON has it
            if own != wanted:
                raise ValueError(
                    f"conditioners.{name}.{field}={own}, but the tokenizer's is {wanted}: set it, "
                    "or dropped conditions aren't the empty prompt"
                )
