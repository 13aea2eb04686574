"""Measures how many latent channels colours need, with a linear first stage of both styles.

    python -m demo.components

Principal components of blocks of 4×4 pixels, fitted on training pictures, are the best linear
latents with f = 4. For each number of components, a row of a Markdown table has the PSNR of
held-out pictures and the accuracy of `judged.Coloured` on reconstructed hearts, circles and
squares.
"""

import numpy as np
from absl import app
from jaxtyping import Float, UInt8

from configs import openmoji_autoencoder
from demo.judged import Coloured
from latent_diffusion import data

SIDE = 4  # side of a block in pixels


def blocks(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N h w D"]:
    """The pixels of each block, in [0, 1]."""
    n, height, width, channels = images.shape
    parts = images.reshape(n, height // SIDE, SIDE, width // SIDE, SIDE, channels) / 255
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(*parts.shape[:2], width // SIDE, -1)


class Linear:
    """The principal components of the blocks of some pictures, in the order of their variance."""

    def __init__(self, images: UInt8[np.ndarray, "N H W 3"]):
        flat = blocks(images).reshape(-1, SIDE * SIDE * images.shape[-1])
        self.mean = flat.mean(0)
        self.components = np.linalg.eigh(np.cov(flat.T))[1][:, ::-1]

    def reconstruct(
        self, images: UInt8[np.ndarray, "N H W 3"], count: int
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """The images' reconstructions from `count` components."""
        basis = self.components[:, :count]
        coded = (blocks(images) - self.mean) @ basis @ basis.T + self.mean
        n, h, w, _ = coded.shape
        pixels = coded.reshape(n, h, w, SIDE, SIDE, -1).transpose(0, 1, 3, 2, 4, 5)
        return np.clip(np.round(255 * pixels), 0, 255).astype(np.uint8).reshape(images.shape)


def main(argv: list[str]) -> None:
    """Print the rows."""
    config = openmoji_autoencoder.get_config("two_styles").data
    sources = (data.make_source(config, split) for split in ("train", "test"))
    train, test = ([source[i] for i in range(len(source))] for source in sources)
    coloured = Coloured([*train, *test])
    plain = np.stack([*coloured.real.values()])
    held_out = np.stack([example["image"] for example in test])
    linear = Linear(np.stack([example["image"] for example in train]))
    for count in range(3, 9):
        error = (linear.reconstruct(held_out, count) - held_out.astype(float)) / 255
        psnr = -10 * np.log10((error**2).mean((1, 2, 3))).mean()
        right = coloured.accuracy(linear.reconstruct(plain, count), [*coloured.real])
        print(f"| {count} | {psnr:.1f} dB | {right:.0%} |", flush=True)


if __name__ == "__main__":
    app.run(main)
