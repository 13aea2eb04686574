"""Convolution and resampling that are fast where XLA's are slow, above all on CPUs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]


def conv2d(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l C F"],
    stride: int = 1,
    padding: Pads | int = 0,
) -> Float[Array, "B h w F"]:
    """`jax.lax.conv_general_dilated` of NHWC images with an HWIO kernel.

    padding: zeros on every side, or ((top, bottom), (left, right)).

    On CPUs, XLA is 20 to 80 times slower where the input or the output has fewer rows or columns
    than the kernel, as in small first stages and the last levels of a U-Net: 600 ms instead of 8 ms
    for 512 -> 512 channels, 3x3 on 32 images of 2x2 pixels. Such images are unfolded here into a
    matrix product.
    """
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    sides = zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
    if all(min(n, (n + sum(pads) - k) // stride + 1) >= k for n, k, pads in sides):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    if stride > 1:
        x, kernel = _without_stride(x, kernel, stride)
    rows, columns = kernel.shape[:2]
    h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    x = jnp.concatenate([x[:, :, j : j + w] for j in range(columns)], -1)
    x = jnp.concatenate([x[:, i : i + h] for i in range(rows)], -1)  # [B h w rows·columns·C]
    return x @ kernel.reshape(-1, kernel.shape[-1])


def _without_stride(x: Array, kernel: Array, stride: int) -> tuple[Array, Array]:
    """An equal convolution of stride 1: blocks of stride² pixels become channels."""
    blocks = [-(-k // stride) for k in kernel.shape[:2]]
    sizes = [  # of the part of the input that outputs depend on, in whole blocks
        ((n - k) // stride + b) * stride
        for n, k, b in zip(x.shape[1:3], kernel.shape[:2], blocks, strict=True)
    ]
    x = _resized(x, (x.shape[0], *sizes, x.shape[3]))
    kernel = _resized(kernel, (*(b * stride for b in blocks), *kernel.shape[2:]))
    (b, h, w, c), (k, m, _, f), s = x.shape, kernel.shape, stride
    x = x.reshape(b, h // s, s, w // s, s, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(k // s, s, m // s, s, c, f).transpose(0, 2, 1, 3, 4, 5)
    return x.reshape(b, h // s, w // s, -1), kernel.reshape(k // s, m // s, -1, f)


def _resized(array: Array, shape: tuple[int, ...]) -> Array:
    """Cut or fill with zeros at the far end of every axis (negative padding cuts)."""
    pads = [(0, new - old, 0) for new, old in zip(shape, array.shape, strict=True)]
    return jax.lax.pad(array, jnp.zeros((), array.dtype), pads)


def upsample_conv2d(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H2 W2 F"]:
    """A 3×3 convolution, with zero padding, of the image at twice its size (nearest neighbour).

    CPUs compute it from the small image. An output depends on 2×2 of its pixels, whose weights are
    sums of kernel weights; the sums differ for the four positions of an output in its block of 2×2.
    This takes 4/9 of the multiplications.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_from_small, default=_from_large)


def _from_large(x: Array, kernel: Array) -> Array:
    return conv2d(upsample_nearest(x), kernel, padding=1)


def _from_small(x: Array, kernel: Array) -> Array:
    def folded(taps: Array, far: int) -> Array:
        first, middle, last = taps
        return jnp.stack([first + middle, last] if far else [first, middle + last])

    def quarter(i: int, j: int) -> Array:
        small = jax.vmap(functools.partial(folded, far=j))(folded(kernel, i))
        return conv2d(x, small, padding=((1 - i, i), (1 - j, j)))

    b, h, w, _ = x.shape
    y = jnp.stack([quarter(i, j) for i in (0, 1) for j in (0, 1)], -2)
    return y.reshape(b, h, w, 2, 2, -1).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, -1)


def upsample_nearest(x: Float[Array, "B H W C"], factor: int = 2) -> Float[Array, "B H2 W2 C"]:
    """Repeat every pixel `factor` times along height and width."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(
        x[:, :, None, :, None, :], (batch, height, factor, width, factor, channels)
    )
    return x.reshape(batch, height * factor, width * factor, channels)


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Mean over 2×2 blocks; an odd last row or column is dropped."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def max_pool(x: Float[Array, "B H W C"], window: int, stride: int) -> Float[Array, "B h w C"]:
    """The largest element of each window; among equal elements the first gets the gradient.

    As `flax.linen.max_pool` without padding, whose gradient takes 20 times as long on CPUs.
    """
    h, w = ((n - window) // stride + 1 for n in x.shape[1:3])
    taps = (
        x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride]
        for i in range(window)
        for j in range(window)
    )
    return functools.reduce(lambda best, tap: jnp.where(tap > best, tap, best), taps)
