"""Makes the tokenizer of a run from training captions, from files, or from `init_from`."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.convert import Bundle
from latent_diffusion.core.types import lookup
from latent_diffusion.data.tokenizers import (
    TOKENIZERS,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    of_encoder,
    with_words,
)
from latent_diffusion.nets.conditioners import Conditioner, make_conditioner, rows_of_words
from latent_diffusion.runtime.workdir import TOKENIZER
from latent_diffusion.training import init_from, settings


def make_tokenizer(
    config: ConfigDict, source: Any, run: Path | None, start: Bundle | None
) -> tuple[ConfigDict, Tokenizer | None]:
    """The config, with a row for each word in text encoders, and the tokenizer of a run.

    source: the training examples. run: the workdir of a run that is resumed, which has a
    tokenizer; None for a new run. start: the model of `init_from`, perhaps with a tokenizer.
    """
    if config.tokenizer.name == "none":
        return config, None
    if run is not None:
        tokenizer = load_tokenizer(run / TOKENIZER)
    elif start is not None and "tokenizer.name" in init_from.facts(config, start):
        config, tokenizer = _from_parameters(config, source, start.tokenizer)
    elif (path := _of_words(config)) is not None:
        tokenizer = load_tokenizer(path)
        fields = {"name": tokenizer.kind, "max_length": tokenizer.max_length}
        decided = {f"tokenizer.{name}": value for name, value in fields.items()}
        config = settings.decided(config, decided, str(path))
    else:
        tokenizer = _new(config.tokenizer, source)
    if run is None and config.textual_inversion.word:
        tokenizer = _with_new_word(config, source, tokenizer)
    check_reads(make_conditioner(config.conditioners), tokenizer)
    return config, tokenizer


def _of_words(config: ConfigDict) -> Path | None:
    """The tokenizer of the run from which a frozen text encoder comes, if its tokens are words.

    The encoder's rows stand for these words. Words of other captions would have other numbers.
    Raises ValueError if the encoders of two runs have other words.
    """
    if config.tokenizer.name != WordTokenizer.kind:
        return None  # other tokenizers don't depend on captions
    conditioner = make_conditioner(config.conditioners)
    parts = zip(conditioner.config, conditioner.parts(), strict=True)
    readers = [name for name, part in parts if "tokens" in part.keys]
    runs = [Path(config.pretrained[name]) for name in readers if name in config.pretrained]
    paths = [run / TOKENIZER for run in runs if (run / TOKENIZER).is_file()]
    if len({path.read_bytes() for path in paths}) > 1:
        raise ValueError(
            f"pretrained: {' and '.join(map(str, paths))} differ, but one tokenizer serves both"
        )
    return paths[0] if paths else None


def _with_new_word(config: ConfigDict, source: Any, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the word `textual_inversion.word`, whose rows are after all others."""
    fields = config.textual_inversion
    first = rows_of_words(make_conditioner(config.conditioners).config)
    rows = range(first, first + fields.num_vectors)
    more: Tokenizer = with_words(tokenizer, {fields.word: rows})
    captions = [text for text in data.captions(source) if fields.word.lower() in text.lower()]
    if not captions or not np.isin(more(captions), rows).any():
        raise ValueError(
            f"textual_inversion.word={fields.word!r} is in none of the training captions, as far "
            f"as tokenizer.max_length={tokenizer.max_length} reads them: it would learn nothing"
        )
    return more


def _new(fields: ConfigDict, source: Any) -> Tokenizer:
    kind = lookup(TOKENIZERS, fields.name, "tokenizer.name")
    if kind is WordTokenizer:
        return kind.train(data.captions(source), fields.vocab_size, fields.max_length)
    if not fields.path:
        raise ValueError(f"tokenizer.name={fields.name!r} needs tokenizer.path: its files")
    return kind.read(fields.path, fields.max_length)


def _from_parameters(
    config: ConfigDict, source: Any, tokenizer: Tokenizer
) -> tuple[ConfigDict, Tokenizer]:
    """The loaded model's tokenizer; words of the captions that it lacks get new rows."""
    frozen = init_from.adapts(config) or config.task == "distillation"
    if not isinstance(tokenizer, WordTokenizer) or frozen:
        return config, tokenizer  # rows can't be added, or wouldn't be trained
    more = tokenizer.extended(data.captions(source), config.tokenizer.vocab_size)
    rows = {"tokenizer.vocab_size": more.vocab_size}
    for name, part in zip(
        config.conditioners, make_conditioner(config.conditioners).parts(), strict=True
    ):
        if "tokens" in part.keys and name not in config.pretrained:
            rows[f"conditioners.{name}.vocab_size"] = max(part.vocab_size, more.vocab_size)
    return settings.decided(config, rows, "the tokenizer of init_from"), more


def check_reads(conditioner: Conditioner, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a text encoder that doesn't fit this tokenizer's numbers."""
    for name, part in zip(conditioner.config, conditioner.parts(), strict=True):
        if "tokens" not in part.keys:
            continue
        encoder_tokenizer = of_encoder(tokenizer, name)
        if part.vocab_size < encoder_tokenizer.vocab_size:
            raise ValueError(
                f"conditioners.{name}.vocab_size={part.vocab_size}, "
                f"but the tokenizer has {encoder_tokenizer.vocab_size} tokens"
            )
        for field in ("empty",) if getattr(part, "repad", False) else ("empty", "pad_id"):
            expected = getattr(encoder_tokenizer, field)
            value = getattr(part, field, expected)
            value = tuple(value) if isinstance(value, list) else value  # a list comes from JSON
            if value != expected:
                raise ValueError(
                    f"conditioners.{name}.{field}={value}, but the tokenizer's is {expected}: set "
                    "it, or dropped conditions aren't the empty prompt"
                )
