"""Adapters of a sampling call: read from files, matched to the model, placed on devices once."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion.convert import read_adapter
from latent_diffusion.convert.adapters import Adapter, Words, weights_of
from latent_diffusion.convert.bundle import Bundle, with_denoiser
from latent_diffusion.data.tokenizers import with_words as with_more_words
from latent_diffusion.generation import program
from latent_diffusion.nets.conditioners import make_conditioner, rows_of_words, with_rows


def load_adapter(
    path: str | os.PathLike,
    word: str | None = None,
    image_encoder: str | os.PathLike | None = None,
) -> Adapter:
    """The adapter in a file or a folder: any kind that docs/adapters.md lists.

    It is a pytree, for the arguments `adapters`, `controls` or `image_prompts` of `Model.sample`.
    word: a textual inversion's name in prompts, instead of that in its file. image_encoder: folder
    of an IP-Adapter's image encoder, instead of that beside its file. If the file can't be read,
    raises ValueError, in one line that begins with the path and names the kind and the tensor.
    """
    adapter: Adapter = jax.tree.map(jnp.asarray, read_adapter(path, word, image_encoder))
    return adapter


def bound(model: Any, adapters: Sequence[Any], mode: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The changes of the model by each adapter, on the devices of a mode, and their weights.

    adapters: pairs of an `Adapter` and its `Weight`. Raises ValueError for an adapter of another
    model, and for prefixes of weights that match no module.
    """
    changes, weights = [], []
    for adapter, weight in sorted(checked(adapters), key=lambda entry: isinstance(entry[0], Words)):
        of_adapter = _changes(model, adapter)
        weights.append(weights_of(of_adapter, weight, adapter.path))
        changes.append(program.placed(adapter, of_adapter, mode))
    return changes, weights


def checked(adapters: Sequence[Any]) -> list[tuple[Adapter, Any]]:
    """The pairs of adapters and weights; ValueError for anything else."""
    for entry in adapters:
        if not (isinstance(entry, tuple | list) and len(entry) == 2):
            raise ValueError(f"adapters are pairs (adapter, weight), not {str(entry)[:80]}")
        if not isinstance(entry[0], Adapter):
            raise ValueError(f"adapters come from load_adapter, not {str(entry[0])[:80]}")
        if entry[0].argument != "adapters":
            raise ValueError(f"{entry[0].path}: give this adapter as {entry[0].argument}=")
    return [(adapter, weight) for adapter, weight in adapters]


def with_words(model: Any, adapters: Sequence[Any]) -> Any:
    """The model, with the words of the adapters in its tokenizer.

    Its text encoders expect tables with further rows, which `program` adds for a call.
    """
    added = [adapter for adapter, _ in checked(adapters) if isinstance(adapter, Words)]
    if not added:
        return model
    if model.tokenizer is None:
        raise ValueError(
            f"{added[0].path}: this model has no tokenizer: load it with tokenizer=PATH"
        )
    config, tokenizer = model.denoiser.conditioner.config, model.tokenizer
    first = rows = rows_of_words(config)
    for adapter in added:
        try:
            tokenizer = with_more_words(
                tokenizer, {adapter.word: range(rows, rows + adapter.count)}
            )
        except ValueError as error:
            raise ValueError(f"{adapter.path}: {error}") from error
        rows += adapter.count
    conditioner = make_conditioner(with_rows(config, rows - first))
    denoiser = model.denoiser.replace(conditioner=conditioner)
    return model.replace(tokenizer=tokenizer, denoiser=denoiser)


def _changes(model: Any, adapter: Adapter) -> dict[str, Any]:
    """The adapter's changes, which it stores for further calls with models of this shape."""
    denoiser = model.denoiser
    shapes = [leaf.shape for leaf in jax.tree.leaves(denoiser.params)]
    key = (denoiser.network, denoiser.conditioner, model.origin.get("linear_projections"), shapes)
    last, changes = vars(adapter).get("_changes", (None, {}))
    if key != last:
        changes = adapter.changes(with_denoiser(Bundle(notes=model.origin), denoiser, {}))
        vars(adapter)["_changes"] = (key, changes)
    return changes
