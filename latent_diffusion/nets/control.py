"""Control nets (Zhang et al. 2023): copies of a U-Net's way down, steered by a picture, the hint.

Their outputs pass through convolutions that are zero at first, and are added to the skips and the
middle of the U-Net, whose parameters don't change. Parameters have the names of released files.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Conditioning, Float, Num, Params
from latent_diffusion.nets.layers import Conv
from latent_diffusion.nets.unet import UNet

HINT = "input_hint_block"  # the parameters of the `HintNet`, beside those of the `ControlNet`


class HintNet(nn.Module):
    """A hint [B H W 3] in [0, 1] as features [B h w features] of the latent's size.

    channels: widths of the levels; each level but the first halves the size.
    """

    features: int
    channels: Sequence[int] = (16, 32, 96, 256)
    dtype: Any = None

    @nn.compact
    def __call__(self, hint: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        index, first, *others = 0, *self.channels
        h = nn.silu(Conv(first, dtype=self.dtype, name="conv_0")(hint))
        for width in others:
            for features, stride in ((h.shape[-1], 1), (width, 2)):
                index += 2
                pad, name = ((1, 1), (1, 1)), f"conv_{index}"
                h = nn.silu(Conv(features, 3, stride, pad, dtype=self.dtype, name=name)(h))
        return Conv(self.features, zero_init=True, dtype=self.dtype, name=f"conv_{index + 2}")(h)


class ControlNet(UNet):
    """The way down of a U-Net, with the U-Net's fields; see `control_net`.

    hint_channels: widths of the `HintNet`. global_pooling: residuals are means over all positions,
    as in the released net for shuffled pictures. takes_concat: the net sees `conditioning.concat`.
    """

    hint_channels: Sequence[int] = (16, 32, 96, 256)
    global_pooling: bool = False
    takes_concat: bool = True

    @property
    def hint_net(self) -> HintNet:
        """The net that embeds a hint as the argument `hint` of `__call__`."""
        return HintNet(self.model_channels, self.hint_channels, self.dtype, parent=None)

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning,
        hint: Float[Array, "B h w F"],
        train: bool = False,
    ) -> tuple[Float[Array, "B ..."], ...]:
        """The residual of each skip, then of the middle."""
        if hint.shape[1:3] != z_t.shape[1:3]:
            raise ValueError(
                f"a control net's hint is embedded as {hint.shape[1]}×{hint.shape[2]}, the latent "
                f"is {z_t.shape[1]}×{z_t.shape[2]}"
            )
        uncontrolled = dataclasses.replace(conditioning, residuals=(), features=(), controls=())
        uncontrolled = dataclasses.replace(uncontrolled, image_context=None)
        if not self.takes_concat:
            uncontrolled = dataclasses.replace(uncontrolled, concat=None)
        skips, h, _ = self._way_down(z_t, t, uncontrolled, train, hint)

        def zero_conv(name: str, x: Array) -> Array:
            return Conv(x.shape[-1], 1, zero_init=True, dtype=self.dtype, name=name)(x)

        outputs = [zero_conv(f"zero_convs_{i}_0", skip) for i, skip in enumerate(skips)]
        outputs.append(zero_conv("middle_block_out_0", h))
        if self.global_pooling:
            outputs = [jnp.mean(x, (1, 2), keepdims=True) for x in outputs]
        return tuple(outputs)


def control_net(unet: UNet, downsampling: int = 8, **overrides: Any) -> ControlNet:
    """The control net of a U-Net. downsampling: pixels of a hint per position of the latent.

    overrides: fields of the `ControlNet` that differ from the U-Net's or their defaults.
    """
    names = [f.name for f in dataclasses.fields(UNet) if f.name not in ("parent", "name")]
    fields = {name: getattr(unet, name) for name in names}
    levels = 1 + round(math.log2(downsampling))
    channels = (16, 32, 96, *[256] * levels)[:levels]
    # It sees no guidance scale, as in diffusers: released nets are for U-Nets without this input.
    own = {"hint_channels": channels, "pool": "", "guidance_dim": None}
    return ControlNet(**{**fields, **own, **overrides}, parent=None)


def init_control(
    net: ControlNet,
    rng: jax.Array,
    unet_params: Params,
    z_t: Float[Array, "B h w c"],
    conditioning: Conditioning,
    image_channels: int = 3,
) -> dict[str, Any]:
    """Copies of the U-Net's parameters and fresh ones: a control net that changes nothing yet."""
    size = 2 ** (len(net.hint_channels) - 1)
    hint = jnp.zeros((1, size * z_t.shape[1], size * z_t.shape[2], image_channels))
    key_h, key_n = jax.random.split(rng)
    embedding, variables = net.hint_net.init_with_output(key_h, hint)
    fresh = net.init(key_n, z_t, jnp.zeros(1), conditioning, embedding)["params"]
    copied = {name: unet_params.get(name, tree) for name, tree in fresh.items()}
    return {**copied, HINT: variables["params"]}


class Controlled(nn.Module):
    """A U-Net with control nets, whose inputs are `conditioning.controls`, in the same order."""

    unet: UNet
    nets: tuple[ControlNet, ...]

    @property
    def guidance_dim(self) -> int | None:
        """The U-Net's `guidance_dim`."""
        return self.unet.guidance_dim

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w k"]:
        conditioning = Conditioning() if conditioning is None else conditioning
        totals = list(conditioning.residuals)
        for net, control in zip(self.nets, conditioning.controls, strict=True):
            outputs = net(z_t, t, conditioning, control.hint, train)
            after, until = control.window[:, 0], control.window[:, 1]
            scales = jnp.where((t > after) & (t <= until), control.scales.T, 0.0)
            scaled = [
                scale[:, None, None, None].astype(x.dtype) * x
                for scale, x in zip(scales, outputs, strict=True)
            ]
            totals = [a + b for a, b in zip(totals, scaled, strict=True)] if totals else scaled
        conditioning = dataclasses.replace(conditioning, residuals=tuple(totals), controls=())
        out: Array = self.unet(z_t, t, conditioning, train)
        return out


def controlled_params(unet: Params, nets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters of a `Controlled`."""
    return {"unet": unet, **{f"nets_{i}": params for i, params in enumerate(nets)}}
