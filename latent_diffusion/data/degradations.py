"""Make small pictures from large ones, for super-resolution: resized, or realistically degraded.

"bsrgan" and "bsrgan_light" are the degradations of the released super-resolution model (Zhang et
al. 2021, as changed for latent diffusion): two blurs, two resizings, noise and JPEG in random
order, and JPEG at the end. All other names are plain resizing.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage

from latent_diffusion.core.types import lookup
from latent_diffusion.data.resampling import MATRICES, PILLOW, resample

Levels = Float[np.ndarray, "H W C"]  # in [0, 1]
Smaller = Float[np.ndarray, "h w C"]
INTERPOLATIONS = ("cv_bilinear", "cv_bicubic", "cv_area")


@dataclass(frozen=True)
class Strength:
    """The differences between the full degradation and the light one."""

    blurs: int = 2
    blur_divisor: float = 1.0  # divides the widths of the blur
    resize_share: float = 0.75  # probability that the first shrinking is a plain resizing
    noise: tuple[int, int] = (2, 25)  # range of its standard deviation, in levels of 255
    quality: tuple[int, int] = (30, 95)  # range of JPEG's quality


FULL = Strength()
LIGHT = Strength(1, 4.0, 0.8, (1, 2), (80, 95))


def bsrgan(image: Levels, factor: int, rng: np.random.Generator, strength: Strength) -> Smaller:
    """Return the degraded picture, with 1/factor of the height and width."""
    if factor == 4 and rng.random() < 0.25:
        # One plain resizing by 2, and then the degradation for a factor of 2.
        name = _interpolation(rng) if rng.random() < 0.5 else "matlab_bicubic"
        image = resample(image, image.shape[0] // 2, image.shape[1] // 2, name)
        factor = 2
    height, width = (n // factor for n in image.shape[:2])
    steps: dict[str, Callable[[Levels], Levels]] = {
        "blur": lambda x: _blur(x, factor, rng, strength),
        "blur again": lambda x: _blur(x, factor, rng, strength) if strength.blurs > 1 else x,
        "shrink": lambda x: _shrink(x, factor, rng, strength.resize_share),
        "shrink to size": lambda x: resample(x, height, width, _interpolation(rng)),
        "noise": lambda x: _noise(x, rng, strength.noise),
        "jpeg": lambda x: _jpeg(x, rng, strength.quality) if rng.random() < 0.9 else x,
    }
    for name in _order(list(steps), rng):
        image = steps[name](image)
    return _jpeg(image, rng, strength.quality)


def _order(names: list[str], rng: np.random.Generator) -> list[str]:
    """A random order in which the random shrinking comes before that to the final size."""
    names = [names[i] for i in rng.permutation(len(names))]
    first, last = names.index("shrink"), names.index("shrink to size")
    if first > last:
        names[first], names[last] = names[last], names[first]
    return names


def _interpolation(rng: np.random.Generator) -> str:
    return INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]


def gaussian_kernel(size: int, covariance: np.ndarray, shift: float | int = 0) -> np.ndarray:
    """Weights [size size] of a Gaussian, with sum 1. shift: that of its centre, in pixels."""
    at = np.arange(size) - (size - 1) / 2 - shift
    x = np.stack(np.meshgrid(at, at), -1)
    weights = np.exp(-0.5 * np.einsum("ijk,kl,ijl->ij", x, np.linalg.inv(covariance), x))
    return weights / weights.sum()


def _filter(image: Levels, kernel: np.ndarray) -> Levels:
    return ndimage.convolve(image, kernel[..., None], mode="mirror").astype(np.float32)


def _blur(image: Levels, factor: int, rng: np.random.Generator, strength: Strength) -> Levels:
    """Blur by a Gaussian, isotropic or, with probability 1/2, anisotropic."""
    light = strength.blur_divisor > 1
    if rng.random() < 0.5:
        angle = rng.uniform(0, np.pi)
        eigenvalues = (4 + factor) / strength.blur_divisor * rng.uniform(0, 1, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        covariance = turn @ np.diag(np.maximum(eigenvalues, 1e-2)) @ turn.T
        size = rng.integers(2, 12) + 3 if light else 2 * rng.integers(2, 12) + 3
    else:
        sigma = (2 + 0.2 * factor) / strength.blur_divisor * rng.uniform(0, 1)
        covariance = max(sigma, 0.1) ** 2 * np.eye(2)
        size = rng.integers(2, 5) + 3 if light else 2 * rng.integers(2, 12) + 3
    return _filter(image, gaussian_kernel(int(size), covariance))


def _shrink(image: Levels, factor: int, rng: np.random.Generator, resize_share: float) -> Smaller:
    """Resize by a random factor up to 2·factor, or blur and take every factor-th pixel."""
    if rng.random() < resize_share:
        scale = 1 / rng.uniform(1, 2 * factor)
        height, width = (max(1, int(n * scale)) for n in image.shape[:2])
        return resample(image, height, width, _interpolation(rng))
    covariance = rng.uniform(0.1, 0.6 * factor) ** 2 * np.eye(2)
    # Taking the first of `factor` pixels shifts the picture by (factor - 1)/2 pixels; the shifted
    # kernel compensates for it.
    kernel = gaussian_kernel(25, covariance, shift=-(factor - 1) / 2)
    return _filter(image, kernel)[::factor, ::factor]


def _noise(image: Levels, rng: np.random.Generator, levels: tuple[int, int]) -> Levels:
    """Add Gaussian noise, independent per channel, equal in all channels, or correlated."""
    kind, sigma = rng.random(), rng.integers(*levels, endpoint=True) / 255
    height, width, channels = image.shape
    if kind > 0.6:
        noise = rng.normal(0, sigma, image.shape)
    elif kind < 0.4:
        noise = rng.normal(0, sigma, (height, width, 1))
    else:
        basis = np.linalg.qr(rng.uniform(size=(channels, channels)))[0]
        covariance = (levels[1] / 255) ** 2 * np.abs(
            basis.T @ np.diag(rng.uniform(size=channels)) @ basis
        )
        noise = rng.multivariate_normal(
            np.zeros(channels), covariance, (height, width), check_valid="ignore"
        )
    return np.clip(image + noise, 0, 1).astype(np.float32)


def _jpeg(image: Levels, rng: np.random.Generator, quality: tuple[int, int]) -> Levels:
    file, drawn = io.BytesIO(), int(rng.integers(*quality, endpoint=True))
    Image.fromarray(_to_bytes(image)).save(file, "JPEG", quality=drawn)
    with Image.open(file) as read:
        return np.asarray(read.convert("RGB"), np.float32) / 255


def _to_bytes(image: Levels) -> UInt8[np.ndarray, "H W C"]:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _resized(name: str) -> Callable:
    def shrink(image: Levels, factor: int, rng: np.random.Generator) -> Smaller:
        return resample(image, image.shape[0] // factor, image.shape[1] // factor, name)

    return shrink


DEGRADATIONS: dict[str, Callable[[Levels, int, np.random.Generator], Smaller]] = {
    "bicubic": _resized("pil_bicubic"),
    "bsrgan": lambda image, factor, rng: bsrgan(image, factor, rng, FULL),
    "bsrgan_light": lambda image, factor, rng: bsrgan(image, factor, rng, LIGHT),
    **{name: _resized(name) for name in (*MATRICES, *PILLOW)},
}


def degrade(
    image: UInt8[np.ndarray, "H W 3"], name: str, factor: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture with 1/factor of the height and width. name: in DEGRADATIONS.

    Raises ValueError for an unknown name, or sides that aren't multiples of the factor.
    """
    make = lookup(DEGRADATIONS, name, "data.low_res")
    if factor < 1 or image.shape[0] % factor or image.shape[1] % factor:
        raise ValueError(
            f"data.low_res_factor={factor} doesn't divide {image.shape[1]}×{image.shape[0]} pixels"
        )
    return _to_bytes(make(image.astype(np.float32) / 255, factor, rng))
