"""Conditioners: from a batch to what the denoiser is told about it.

A conditioner is a Linen module `__call__(batch, drop: Bool[B]) -> Conditioning`. It names the batch
`keys` it reads and owns its null embedding; where `drop` is true the example is unconditional, so
conditioning dropout in training and classifier-free guidance share one path.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.conditioners.class_label import ClassLabel
from latent_diffusion.conditioners.clip_text import ClipText
from latent_diffusion.conditioners.text import TextTransformer
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Config, lookup

CONDITIONERS: dict[str, Any] = {
    "class_label": ClassLabel,
    "clip_text": ClipText,
    "text": TextTransformer,
}


def combine(parts: list[Conditioning]) -> Conditioning:
    """Join conditionings: `concat` along channels, `context` along tokens, `vector` along width."""

    def join(field: str, axis: int) -> Array | None:
        arrays = [value for part in parts if (value := getattr(part, field)) is not None]
        return jnp.concatenate(arrays, axis) if arrays else None

    return Conditioning(join("concat", -1), join("context", 1), join("vector", -1))


class Conditioner(nn.Module):
    """Any number of conditioners as one; none at all is unconditional.

    config: conditioner name → its fields.
    """

    config: Mapping[str, Mapping[str, Any]]

    @property
    def keys(self) -> tuple[str, ...]:
        """Batch keys that are read."""
        return tuple(key for name in self.config for key in CONDITIONERS[name].keys)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        missing = [key for key in self.keys if key not in batch]
        if missing:
            raise ValueError(
                f"conditioning needs {', '.join(missing)}; the batch has {', '.join(sorted(batch))}"
            )
        return combine(
            [CONDITIONERS[name](**own, name=name)(batch, drop) for name, own in self.config.items()]
        )


def make_conditioner(config: Config) -> Conditioner:
    """The conditioners named in `config`; unknown names or fields raise a one-line ValueError."""
    for name, fields in config.items():
        module = lookup(CONDITIONERS, name, "conditioner")
        known = [f for f in module.__dataclass_fields__ if f not in ("parent", "name")]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(
                f"conditioners.{name}: unknown field {unknown[0]!r}; known: {', '.join(known)}"
            )
    return Conditioner({name: dict(fields) for name, fields in config.items()})
