"""`load(path)`: a trained model from wherever it lies."""

import os
from pathlib import Path

import jax.numpy as jnp

from latent_diffusion import workdir
from latent_diffusion.checkpoint import Checkpointer, CheckpointError
from latent_diffusion.conditioners import make_conditioner
from latent_diffusion.denoiser import make_denoiser
from latent_diffusion.first_stage import FirstStage, make_autoencoder
from latent_diffusion.model import Model
from latent_diffusion.tokenizers import load_tokenizer


def load(path: str | os.PathLike) -> Model:
    """The model of a workdir, with averaged parameters: a first stage alone, or the whole.

    Raises ValueError or CheckpointError, in one line, where there is none.
    """
    directory = Path(path)
    config = workdir.load_config(directory)
    module = make_autoencoder(config.autoencoder)
    size = config.data.image_size
    if config.task == "autoencoding":
        params = workdir.load_autoencoder_params(directory, config)
        first_stage = FirstStage(params, jnp.ones(()), jnp.zeros(()), module)
        return Model(first_stage=first_stage, image_size=size)
    first_stage = workdir.load_first_stage(directory, module)
    denoiser = make_denoiser(config, make_conditioner(config.conditioners), module.latent_channels)
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(only=["ema_params"])
    if restored is None:
        raise CheckpointError(f"{directory} has no checkpoint yet")
    tokenizer = None
    if config.tokenizer.name != "none":
        tokenizer = load_tokenizer(directory / workdir.TOKENIZER)
    return Model(
        first_stage=first_stage,
        denoiser=denoiser.replace(params=restored.state["ema_params"]),
        tokenizer=tokenizer,
        defaults=config.sampling.to_dict(),
        image_size=size,
    )
