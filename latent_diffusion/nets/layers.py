"""The layers of both networks: convolution, linear map, norms, timestep embedding."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Float, Num
from latent_diffusion.nets.convolution import conv2d, upsample_conv2d

Padding = str | Sequence[tuple[int, int]]


def fan_in_uniform(fan_in: int):
    """U(±1/√fan_in): the reference networks draw weights and biases from it."""
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def parameter(module: nn.Module, name: str, init: Callable[..., Any], shape: tuple) -> Any:
    """`module.param(name, init, shape)`, by which an existing parameter is read at once.

    Flax traces the initialiser at each application of a network, to compare the shapes; that took
    a fifth of the time of tracing it. Raises ScopeParamShapeError for a parameter of another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value: Any = module.get_variable("params", name)
    if value.shape != shape:
        where = "/".join(module.path)
        raise flax.errors.ScopeParamShapeError(name, where, value.shape, shape)
    return value


class Conv(nn.Module):
    """2-d convolution, NHWC, initialised as the reference networks are: U(±1/√fan_in)."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    zero_init: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        init = nn.initializers.zeros if self.zero_init else fan_in_uniform(int(np.prod(shape[:3])))
        kernel = parameter(self, "kernel", init, shape)
        bias = parameter(self, "bias", init, (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = self.convolve(x, kernel)
        return y if bias is None else y + bias

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution of arrays that have one dtype."""
        padding = self.padding
        if isinstance(padding, str):
            strides = (self.stride, self.stride)
            padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        (top, bottom), (left, right) = padding
        return conv2d(x, kernel, self.stride, ((top, bottom), (left, right)))


class UpsampleConv(Conv):
    """A 3×3 convolution of the image at twice its size, nearest neighbour."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution of arrays that have one dtype."""
        return upsample_conv2d(x, kernel)


class Dense(nn.Module):
    """Linear map of the last axis, initialised as the reference networks are.

    kernel_init: another initialiser of the kernel; the bias is then zero at first.
    """

    features: int
    use_bias: bool = True
    zero_init: bool = False
    dtype: Any = None
    kernel_init: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        zeros = nn.initializers.zeros
        init = zeros if self.zero_init else self.kernel_init or fan_in_uniform(x.shape[-1])
        kernel = parameter(self, "kernel", init, (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", zeros if self.kernel_init else init, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x @ kernel
        return y if bias is None else y + bias


class GroupNorm(nn.Module):
    """Group normalisation, in float32 for every compute dtype (Wu & He 2018)."""

    num_groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(
                f"GroupNorm: {channels} channels are not divisible by num_groups={self.num_groups}"
            )
        scale = parameter(self, "scale", nn.initializers.ones, (channels,))
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
        flat = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)

        def group_mean(values: Array) -> Array:
            """Means over groups, [B L C] to [B 1 C]. Positions come first, which vectorises."""
            means = jnp.mean(values, 1).reshape(x.shape[0], self.num_groups, -1)
            return jnp.repeat(jnp.mean(means, -1), channels // self.num_groups, -1)[:, None]

        mean = group_mean(flat)
        variance = group_mean(jnp.square(flat - mean))
        # One multiply-add per element: fold the statistics into per-channel factors first.
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale
        return (flat * factor + (bias - mean * factor)).reshape(x.shape).astype(x.dtype)


def layer_norm(name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Layer normalisation, in float32 for every compute dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def precomputed(module: nn.Module, collection: str, compute: Callable[[], Any]) -> Any:
    """The value in the module's variables of `collection` if there is one, else `compute()`.

    Applying the network with a mutable `collection` returns such values. A sampler does so once,
    before its loop, for all values that don't depend on the latent; see `Denoiser.prepare`.
    """
    if module.has_variable(collection, "value") and not module.is_mutable_collection(collection):
        return module.get_variable(collection, "value")
    value = compute()
    if not module.is_initializing():
        module.sow(collection, "value", value, reduce_fn=lambda _, new: new)
    return value


def guidance_embedding(w: Float[Array, " B"], dim: int) -> Float[Array, "B D"]:
    """[sin(1000·w·ω_i), cos(1000·w·ω_i)] with ω_i = 10⁴^(−i/(half − 1)), half = dim // 2.

    w: guidance scales minus one. This is the embedding of latent consistency models (Luo et al.
    2023).
    """
    half = dim // 2
    cos_and_sin = timestep_embedding(1000 * w, 2 * half, shift=1)
    embedding = jnp.roll(cos_and_sin, half, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def timestep_embedding(t: Num[Array, " B"], dim: int, shift: int = 0) -> Float[Array, "B D"]:
    """[cos(t·ω_i), sin(t·ω_i)], ω_i = 10000^(−i/(half − shift)), half = dim // 2, as in LDM.

    t: timesteps, integer-valued or fractional. Odd dims get a zero column. shift: 1 makes the last
    frequency exactly 1/10000.
    """
    half = dim // 2
    exponents = np.arange(half) / (half - shift)
    frequencies = np.exp(-np.log(10_000.0) * exponents).astype(np.float32)
    angles = t[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
