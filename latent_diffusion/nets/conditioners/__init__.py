"""Conditioners: from a batch to what the denoiser is told about it.

A conditioner is a Linen module `__call__(batch, drop: Bool[B]) -> Conditioning`. It names the batch
`keys` it reads and owns its null embedding; where `drop` is true the example is unconditional, so
conditioning dropout in training and classifier-free guidance share one path. A conditioner is
pure; what needs the frozen first stage or a key is done before, by its `prepare`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.nets.conditioners.bert import Bert
from latent_diffusion.nets.conditioners.class_label import ClassLabel
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.nets.conditioners.depth import Depth
from latent_diffusion.nets.conditioners.image_embedding import ImageEmbedding
from latent_diffusion.nets.conditioners.layout import Layout
from latent_diffusion.nets.conditioners.layout_map import LayoutMap
from latent_diffusion.nets.conditioners.low_res import LowRes
from latent_diffusion.nets.conditioners.masked_image import MaskedImage
from latent_diffusion.nets.conditioners.neighbours import Neighbours
from latent_diffusion.nets.conditioners.spatial_rescaler import SpatialRescaler
from latent_diffusion.nets.conditioners.text import TextTransformer
from latent_diffusion.nets.conditioners.word_map import WordMap
from latent_diffusion.types import Array, Batch, Bool, Conditioning, Config, Keys, lookup

CONDITIONERS: dict[str, Any] = {
    "class_label": ClassLabel,
    "bert": Bert,
    "clip_image": ClipImage,
    "clip_text": ClipText,
    "text": TextTransformer,
    "layout": Layout,
    "layout_map": LayoutMap,
    "spatial_rescaler": SpatialRescaler,
    "low_res": LowRes,
    "masked_image": MaskedImage,
    "depth": Depth,
    "neighbours": Neighbours,
    "image_embedding": ImageEmbedding,
    "word_map": WordMap,
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
        return tuple(dict.fromkeys(key for part in self.parts() for key in part.keys))

    @property
    def optional(self) -> tuple[str, ...]:
        """Batch keys that are read, but drawn where they are missing."""
        return tuple(key for part in self.parts() for key in getattr(part, "optional", ()))

    @nn.nowrap
    def prepare(
        self, batch: Batch, first_stage: Any, size: tuple[int, ...], rng: Keys | None = None
    ) -> Batch:
        """The batch, with what conditioners read but can't make: latents, noise, another size.

        It comes before `__call__`, once for a batch. first_stage: the frozen one. size: (h, w) of
        the latent. rng: one key for each example, for conditioners that add noise.
        """
        self._check(batch)
        for part in self.parts():
            if hasattr(part, "prepare"):
                batch = part.prepare(batch, first_stage, size, rng)
        return batch

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        self._check(batch)
        return combine(
            [CONDITIONERS[name](**own, name=name)(batch, drop) for name, own in self.config.items()]
        )

    @nn.nowrap
    def parts(self) -> list[Any]:
        """The conditioners apart, without parameters."""
        return [CONDITIONERS[name](**own, parent=None) for name, own in self.config.items()]

    @nn.nowrap
    def _check(self, batch: Batch) -> None:
        missing = [key for key in self.keys if key not in batch]
        if missing:
            raise ValueError(
                f"conditioning needs {', '.join(missing)}; the batch has {', '.join(sorted(batch))}"
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
    return Conditioner({name: _static(fields) for name, fields in config.items()})


def _static(fields: Config) -> dict[str, Any]:
    """Fields as a module compares them: JSON's lists are tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
