"""A representation of one picture: variations of it."""

import flax.linen as nn

from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.types import Array, Batch, Bool, Conditioning


class ImageEmbedding(nn.Module):
    """`image_embedding` [B width] → context of one token, or a vector.

    route: "context" for cross-attention, "vector" for the timestep's embedding (unCLIP). The
    embeddings come from any frozen net; see `embedders`. Null: zeros.
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
        embedding = zeros_where(drop, embedding)
        if self.route == "vector":
            return Conditioning(vector=embedding)
        if self.route == "context":
            return Conditioning(context=embedding[:, None, :])
        raise ValueError(f"image_embedding.route={self.route!r}; known: context, vector")
