"""Label maps, brought down to the size of the latent."""

import flax.linen as nn
import jax

from latent_diffusion.nets.conditioners.null import zeros_where
from latent_diffusion.nets.convolution import average_pool
from latent_diffusion.nets.layers import Conv
from latent_diffusion.types import Array, Batch, Bool, Conditioning


class SpatialRescaler(nn.Module):
    """`segmentation` [B H W] → concat [B H/2ⁿ W/2ⁿ C] (Rombach et al. 2022, App. E.2.2).

    One-hot maps of `num_classes` labels are halved `num_stages` times, which is the mean over 2×2
    pixels (bilinear without antialiasing), and mapped to `out_channels` by a 1×1 convolution; 0
    leaves them as they are. A label outside the classes belongs to none. Null: zeros.
    """

    num_classes: int = 182
    num_stages: int = 2
    out_channels: int = 3
    use_bias: bool = False

    keys = ("segmentation",)

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, " B"]) -> Conditioning:
        labels, factor = batch["segmentation"], 2**self.num_stages
        if labels.shape[1] % factor or labels.shape[2] % factor:
            raise ValueError(
                f"spatial_rescaler: a map of {labels.shape[1]}×{labels.shape[2]} can't be halved "
                f"num_stages={self.num_stages} times"
            )
        x = jax.nn.one_hot(labels, self.num_classes)
        for _ in range(self.num_stages):
            x = average_pool(x)
        if self.out_channels:
            x = Conv(self.out_channels, 1, use_bias=self.use_bias, name="channel_mapper")(x)
        return Conditioning(concat=zeros_where(drop, x))
