"""Prompts as batch entries: `tokens` [N L], and their weights if prompts have weights."""

import logging
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latent_diffusion.data.tokenizers import ClipTokenizer
from latent_diffusion.generation import conditions
from latent_diffusion.nets.conditioners.clip_text import ClipText

log = logging.getLogger(__name__)
Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]


def make_tokenize(model: Any, weighted: bool, *texts: str | Sequence[str] | None) -> Tokenize:
    """The function that turns prompts into batch entries with the tokenizer of a `Model`.

    weighted: whether prompts may have weights and any length. texts: all prompts of a call, which
    then get the same number of chunks. Raises ValueError if the model can't read weights.
    """
    tokenizer = model.tokenizer
    if not weighted:
        return lambda prompts: {"tokens": _tokens(tokenizer, prompts)}
    lists = [[text] if isinstance(text, str) else text or [] for text in texts]
    chunks = num_chunks(model, [prompt for prompts in lists for prompt in prompts])

    def tokenize(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        tokens, weights = tokenizer.weighted(prompts, chunks)
        return {"tokens": tokens, "tokens_weights": weights}

    return tokenize


def num_chunks(model: Any, prompts: Sequence[str]) -> int:
    """The number of chunks of the longest weighted prompt.

    Raises ValueError if the model can't read weights.
    """
    tokenizer = model.tokenizer
    readers = [part for part in model.conditioner.parts() if "tokens" in part.keys]
    reads = [isinstance(part, ClipText) for part in readers]
    if not (isinstance(tokenizer, ClipTokenizer) and reads and all(reads)):
        raise ValueError("prompt_weights needs a model with CLIP's text encoder and tokenizer")
    return max((len(tokenizer.chunks(prompt)) for prompt in prompts), default=1)


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """The tokens of prompts; a warning lists words that the tokenizer doesn't know."""
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: load it with tokenizer=PATH")
    for prompt in prompts:
        if unknown := tokenizer.unknown_words(prompt):
            log.warning("unknown words in %r: %s", prompt, ", ".join(unknown))
    tokens: np.ndarray = tokenizer(list(prompts))
    return tokens


def check_beside(
    model: Any, negative: str | Sequence[str] | None, more: Sequence[tuple[str, float | int]]
) -> None:
    """Raise ValueError for texts that the model doesn't read, and for pairs that are none."""
    given = {"negative_prompts": negative is not None, "more_prompts": len(more) > 0}
    if "tokens" not in model.conditioner.keys and any(given.values()):
        name = next(name for name in given if given[name])
        raise ValueError(f"{name} given, but this model reads no prompts")
    for pair in more:
        try:
            text, weight = pair
            fits = isinstance(text, str) and math.isfinite(weight)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"more_prompts: {reprlib.repr(pair)}: write (text, weight)")


def beside(
    tokenize: Tokenize,
    negative: str | Sequence[str] | None,
    more: Sequence[tuple[str, float | int]],
    num_images: int,
    total: int,
) -> dict[str, np.ndarray]:
    """The batch entries [total ...] of negative and further prompts."""
    entries = {f"more_{i}": tokenize([text]) for i, (text, _) in enumerate(more)}
    if negative is not None:
        texts, prompts = conditions.texts("negative_prompts", negative), total // num_images
        if len(texts) not in (1, prompts):
            raise ValueError(
                f"{len(texts)} negative_prompts for {prompts} prompts; "
                "give one for all, or one for each"
            )
        entries["negative"] = tokenize(texts)
    return {
        key.replace("tokens", name): np.repeat(rows, total // len(rows), 0)
        for name, entry in entries.items()
        for key, rows in entry.items()
    }
