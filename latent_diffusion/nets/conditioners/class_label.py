"""Class labels as one context token or as a vector."""

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.types import Array, Batch, Bool, Conditioning


class ClassLabel(nn.Module):
    """A learned embedding per class; the last row is the null class (id `num_classes`).

    route: "context" gives [B 1 width] for cross-attention, "vector" gives [B width].
    Labels outside [0, num_classes] read the null class.
    """

    num_classes: int = 1000
    width: int = 512
    route: str = "context"

    keys = ("class_label",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        label = batch["class_label"]
        known = (label >= 0) & (label < self.num_classes) & ~drop
        table = nn.Embed(
            self.num_classes + 1,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
            name="embedding",
        )
        vector = table(jnp.where(known, label, self.num_classes))
        if self.route == "vector":
            return Conditioning(vector=vector)
        if self.route == "context":
            return Conditioning(context=vector[:, None, :])
        raise ValueError(f"class_label.route={self.route!r}; known: context, vector")
