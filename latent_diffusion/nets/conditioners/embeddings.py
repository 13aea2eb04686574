"""Conditions that are vectors: class labels, and embeddings of pictures."""

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Batch, Bool, Conditioning, Float
from latent_diffusion.nets.conditioners.null import zeros_where


def _routed(name: str, route: str, vector: Float[Array, "B D"]) -> Conditioning:
    """The vector as `vector`, or as a context of one token. name: the conditioner's, for errors."""
    if route == "vector":
        return Conditioning(vector=vector)
    if route == "context":
        return Conditioning(context=vector[:, None, :])
    raise ValueError(f"{name}.route={route!r}; known: context, vector")


class ClassLabel(nn.Module):
    """A learned embedding of `class_label` [B]; the last row (`num_classes`) is the null class.

    route: "context" gives tokens [B 1 width] for cross-attention, "vector" gives [B width] for the
    embedding of the timestep. Labels outside [0, num_classes] count as the null class.
    """

    num_classes: int = 1000
    width: int = 512
    route: str = "context"

    keys = ("class_label",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        label, init = batch["class_label"], nn.initializers.normal(1.0)
        valid = (label >= 0) & (label < self.num_classes) & ~drop
        table = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="embedding")
        return _routed("class_label", self.route, table(jnp.where(valid, label, self.num_classes)))


class ImageEmbedding(nn.Module):
    """`image_embedding` [B width], from a frozen network (`data.embedders`): picture variations.

    route: "context" gives one token for cross-attention, "vector" adds to the embedding of the
    timestep (unCLIP, Ramesh et al. 2022). The null condition is zeros.
    """

    width: int = 768
    route: str = "context"

    keys = ("image_embedding",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        embedding = batch["image_embedding"]
        if embedding.shape[1] != self.width:
            raise ValueError(
                f"image_embedding: {embedding.shape[1]} numbers, expected width={self.width}"
            )
        return _routed("image_embedding", self.route, zeros_where(drop, embedding))


class Neighbours(nn.Module):
    """`neighbours` [B k width], embeddings of k similar pictures, as the context's tokens.

    Retrieval-augmented diffusion (Blattmann et al. 2022). Training uses k = num_neighbours;
    sampling takes any k, for example the single embedding of a text. The null condition is zeros.
    """

    num_neighbours: int = 4
    width: int = 512

    keys = ("neighbours",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = batch["neighbours"]
        if tokens.shape[2] != self.width:
            raise ValueError(
                f"neighbours: embeddings of {tokens.shape[2]} numbers, expected width={self.width}"
            )
        return Conditioning(context=zeros_where(drop, tokens))
