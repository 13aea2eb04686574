"""The timed networks, a text U-Net and a first stage with random weights, and their inputs.

`write` saves both in folders of diffusers, from which either side loads them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import default

SCALE, STEPS, GUIDED = 5.0, 50, 2  # of guided sampling, which evaluates twice as many images
PICTURES = 64  # files that the input pipeline reads repeatedly


def denoising(quick: bool) -> ConfigDict:
    """Latent denoising of data of 32×32×4 with contexts of 77 tokens of width 256."""
    c = default.get_config()
    c.batch_size = 1 if quick else 4
    c.autoencoder.update({"regularization": "identity", "image_channels": 4})
    c.data.image_size = 8 if quick else 32
    c.first_stage.normalization = "none"
    # These embeddings are the context; their null is zero.
    c.conditioners = ConfigDict(
        {"neighbours": {"num_neighbours": 7 if quick else 77, "width": 8 if quick else 256}}
    )
    c.unet.model_channels = 32 if quick else 64
    c.unet.channel_mult = (1, 2) if quick else (1, 2, 4, 4)
    c.unet.num_res_blocks = 1 if quick else 2
    c.unet.attention_resolutions = (2,) if quick else (1, 2, 4)
    return c


def autoencoding(quick: bool) -> ConfigDict:
    """Perceptual compression of 128×128 pixels by f = 4: every part of the loss, from step 0."""
    c = default.get_config()
    c.task = "autoencoding"
    c.batch_size = 1 if quick else 4
    c.data.image_size = 32 if quick else 128
    c.autoencoder.channels = 32
    c.autoencoder.channel_mult = (1, 2) if quick else (1, 2, 4)
    c.autoencoder.num_res_blocks = 1
    c.autoencoding.perceptual = "alex" if quick else "vgg"
    c.autoencoding.discriminator.update({"num_layers": 2} if quick else {})
    c.autoencoding.update({"disc_start": 0, "adversarial_start": 0})
    c.optimizer.name = "adam"
    c.ema_decay = 0.0
    return c


def inputs(quick: bool) -> dict[str, np.ndarray]:
    """Images in [-1, 1], noisy latents, timesteps and contexts, the same on both sides."""
    stage_1, stage_2 = autoencoding(quick), denoising(quick)
    rng, size, side = np.random.default_rng(0), stage_2.batch_size, stage_2.data.image_size
    context = (
        stage_2.conditioners.neighbours.num_neighbours,
        stage_2.conditioners.neighbours.width,
    )
    return {
        "image": rng.uniform(-1, 1, (size, *(stage_1.data.image_size,) * 2, 3)).astype(np.float32),
        "z_t": rng.standard_normal((size, side, side, 4), np.float32),
        "t": np.linspace(10, 990, size, dtype=np.float32).round(),
        "context": rng.standard_normal((size, *context), np.float32),
    }


def write(folder: Path, quick: bool) -> None:
    """The folders `unet` and `vae`, and the discriminator's parameters in `discriminator.npz`."""
    import jax
    from flax.traverse_util import flatten_dict

    from latent_diffusion.generation.model import Model
    from latent_diffusion.models.first_stage import FirstStage
    from latent_diffusion.tasks import TASKS
    from latent_diffusion.training.batch_spec import batch_spec

    configs = {"autoencoding": autoencoding(quick), "denoising": denoising(quick)}
    tasks: Any = {name: TASKS[name](config) for name, config in configs.items()}
    states = {
        name: jax.eval_shape(task.init, jax.random.key(0), batch_spec(configs[name]))[0]
        for name, task in tasks.items()
    }
    unet = drawn(1, states["denoising"].params["unet"])
    vae = drawn(2, states["autoencoding"].params["autoencoder"])
    denoiser = tasks["denoising"].denoiser.replace(params={"unet": unet})
    first_stage = FirstStage(vae, 1.0, 0.0, tasks["autoencoding"].autoencoder)
    Model(denoiser=denoiser).save(folder / "unet", "diffusers")
    Model(first_stage=first_stage).save(folder / "vae", "diffusers")
    flat = flatten_dict(drawn(3, states["autoencoding"].disc_params), sep="/")
    np.savez(folder / "discriminator.npz", **flat)


def drawn(seed: int, shapes: Any) -> Any:
    """Random weights, none of them zero, which roughly preserve the scale of their inputs."""
    import jax

    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: weight(rng, jax.tree_util.keystr(path), x.shape), shapes
    )


def weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random weight with this name in a network."""
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 100
    noise = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
    return noise + np.float32("'scale'" in name)
