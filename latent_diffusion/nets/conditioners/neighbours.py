"""What similar pictures look like: retrieval-augmented diffusion."""

import flax.linen as nn

from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.types import Array, Batch, Bool, Conditioning


class Neighbours(nn.Module):
    """`neighbours` [B k width]: image embeddings → context of k tokens (Blattmann et al. 2022).

    Any number of them may be given in sampling, also one embedding of a text; trained is with
    num_neighbours. Null: zeros.
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
