"""PatchGAN, the discriminator of perceptual compression (Isola et al. 2017, §3.2.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core import rng
from latent_diffusion.core.types import Array, Float, lookup
from latent_diffusion.nets.convolution import conv2d
from latent_diffusion.nets.layers import fan_in_uniform


class ActNorm(nn.Module):
    """Scale and shift per channel, set by the first training batch (Kingma and Dhariwal, 2018).

    y = scale · gain · (x + offset + loc). `loc` (0) and `scale` (1) are parameters; `offset` and
    `gain`, in the collection `batch_stats`, are −mean and 1 / (deviation + 1e-6) of the first
    batch with `train=True`, over all devices of `axis_name`, and never change again. For a
    checkpoint that folds both into loc and scale, set offset to 0, gain to 1, initialized to 1.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool = False) -> Float[Array, "B h w C"]:
        """Normalise x; `train=True` fixes offset and gain if they aren't yet."""
        shape = (x.shape[-1],)
        loc = self.param("loc", nn.initializers.zeros, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        offset = self.variable("batch_stats", "offset", jnp.zeros, shape)
        gain = self.variable("batch_stats", "gain", jnp.ones, shape)
        initialized = self.variable("batch_stats", "initialized", jnp.zeros, ())
        offset_now, gain_now = offset.value, gain.value
        if train and not self.is_initializing():
            axes = tuple(range(x.ndim - 1))
            mean = rng.pmean(x.mean(axes), self.axis_name)
            variance = rng.pmean(jnp.square(x - mean).mean(axes), self.axis_name)
            measured = jax.lax.stop_gradient((-mean, 1.0 / (jnp.sqrt(variance) + 1e-6)))
            offset_now = jnp.where(initialized.value > 0, offset_now, measured[0])
            gain_now = jnp.where(initialized.value > 0, gain_now, measured[1])
            offset.value, gain.value = offset_now, gain_now
            initialized.value = jnp.ones(())
        return scale * gain_now * (x + offset_now + loc)


NORMS = ("batch", "actnorm")


class _Conv(nn.Module):
    """A 4x4 convolution: weights N(0, 0.02²), biases U(±1/√fan_in) as the original leaves them."""

    features: int
    stride: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        shape = (4, 4, x.shape[-1], self.features)
        y = conv2d(x, self.param("kernel", nn.initializers.normal(0.02), shape), self.stride, 1)
        if self.use_bias:
            y += self.param("bias", fan_in_uniform(16 * x.shape[-1]), (self.features,))
        return y


class PatchGAN(nn.Module):
    """A stack of 4x4 convolutions that judges overlapping patches; its outputs are logits.

    channels: width of the first layer; each of the `num_layers` others doubles it, up to 8 times.
    num_layers: 3 sees patches of 70 pixels (256² -> 30x30 logits), 2 of 34 (256² -> 62x62).
    norm: "batch" or "actnorm" (whose convolutions then have biases, as in the original).
    axis_name: the mapped axis over which batch statistics are averaged under pmap.

    The collection `batch_stats` holds running statistics. With `train=True` the statistics of the
    batch normalise it, and the running statistics move: the caller makes the collection mutable,
    and may drop the new values. Running variances are biased (PyTorch's are n/(n−1) times larger,
    n = B·h·w); training never reads them.
    The original's layer main.0 is `conv_in`, main.{3n−1} `conv{n}`, main.{3n} `norm{n}`, for n in
    1 ... num_layers, and main.{3·num_layers + 2} `conv_out`.
    """

    channels: int = 64
    num_layers: int = 3
    norm: str = "batch"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w 1"]:
        """Logits of x, images in [-1, 1] with a condition's channels appended if there is one."""
        smallest = 3 * 2**self.num_layers
        if self.num_layers < 1 or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchGAN with num_layers={self.num_layers} needs num_layers >= 1 and images of at"
                f" least {smallest} pixels a side, got {x.shape[1]}x{x.shape[2]}"
            )
        x = x.astype(jnp.float32)
        lookup(dict.fromkeys(NORMS), self.norm, "PatchGAN norm")
        x = nn.leaky_relu(_Conv(self.channels, 2, name="conv_in")(x), 0.2)
        for n in range(1, self.num_layers + 1):
            width = self.channels * min(2**n, 8)
            stride = 2 if n < self.num_layers else 1
            x = _Conv(width, stride, use_bias=self.norm != "batch", name=f"conv{n}")(x)
            x = nn.leaky_relu(self._normalize(x, train, f"norm{n}"), 0.2)
        return _Conv(1, 1, name="conv_out")(x)

    def _normalize(self, x: Array, train: bool, name: str) -> Array:
        if self.norm == "actnorm":
            return ActNorm(self.axis_name, name=name)(x, train)
        norm = nn.BatchNorm(
            momentum=0.9,
            epsilon=1e-5,
            axis_name=self.axis_name,
            scale_init=lambda *args: 1.0 + nn.initializers.normal(0.02)(*args),
            name=name,
        )
        return norm(x, use_running_average=not train)
