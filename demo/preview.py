"""Compares a tiny decoder with the full decoder: PSNR of held-out pictures, pictures per second.

    python -m demo.preview --model=runs/demo/denoiser --preview=runs/demo/preview

Both decode the latents of the model's encoder, for all pictures of the test split.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from latent_diffusion import data
from latent_diffusion.generation.loading import load
from latent_diffusion.nets.losses.similarity import psnr
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.startup import quiet_and_cached

BATCH, REPEATS = 128, 20


def measure(model: Any, preview: Any, images: np.ndarray) -> dict[str, dict[str, float]]:
    """PSNR in dB of images [N H W 3] in [-1, 1], and decoded pictures per second, by decoder.

    The speed is that of the fastest of many calls, in which the decoders alternate.
    """
    x = jnp.asarray(images)
    parts = [model.encode(x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    numbers, seconds = {}, {}
    decoders = {"full": model.decode, "tiny": preview.decode}
    for name, decode in decoders.items():
        decoded = jnp.concatenate([decode(z) for z in parts])
        numbers[name] = {"psnr": float(jnp.mean(psnr(x, decoded)))}
        seconds[name] = float("inf")
    for _ in range(REPEATS):
        for name, decode in decoders.items():
            start = time.perf_counter()
            decode(parts[0]).block_until_ready()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    for name in decoders:
        numbers[name]["images_per_second"] = len(parts[0]) / seconds[name]
    return numbers


def main(argv: list[str]) -> None:
    """Print a line for each decoder."""
    quiet_and_cached()
    try:
        model, preview = load(MODEL.value), load(PREVIEW.value)
        config = workdir.load_config(Path(MODEL.value)).data
        test, transform = data.make_source(config, "test"), data.make_transform(config, train=False)
        images = np.stack([transform(test[i])["image"] for i in range(len(test))])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, values in measure(model, preview, images).items():
        print(name, {key: round(value, 2) for key, value in values.items()})


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "runs/demo/denoiser", "The model's workdir.")
    PREVIEW = flags.DEFINE_string("preview", "runs/demo/preview", "The tiny autoencoder's workdir.")
    app.run(main)
