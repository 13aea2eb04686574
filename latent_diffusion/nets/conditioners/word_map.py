"""Every word as a small picture, drawn beside the latent."""

import flax.linen as nn
import jax.numpy as jnp

from latent_diffusion.types import Array, Batch, Bool, Conditioning


class WordMap(nn.Module):
    """`tokens` [B L] → concat [B height width channels]: the sum of the words' learned maps.

    Cross-attention has to learn where a word's colours and shapes belong; here a linear map says
    so from the first steps, which is what a short training on a few thousand captions needs. Beside
    a text transformer it makes a hybrid of concatenation and cross-attention. height, width: of the
    latent. Padding (token 0) has no map, so the null condition is 0.
    """

    vocab_size: int = 2048
    height: int = 8
    width: int = 8
    channels: int = 8

    keys = ("tokens",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        tokens = batch["tokens"]
        shape = (self.height, self.width, self.channels)
        numbers = self.height * self.width * self.channels
        maps = nn.Embed(
            self.vocab_size, numbers, embedding_init=nn.initializers.normal(0.02), name="embedding"
        )(tokens)
        told = (tokens != 0) & ~drop[:, None]
        total = jnp.sum(jnp.where(told[..., None], maps, 0), axis=1)
        return Conditioning(concat=total.reshape(-1, *shape))
