"""The experiments that tests train: both tasks, small enough to compile in seconds."""

import numpy as np

from configs import (
    openmoji_autoencoder,
    openmoji_classifier,
    openmoji_few_steps,
    openmoji_prior,
    openmoji_text,
)
from latent_diffusion.training.batch_spec import batch_spec

SIZE, BATCH = 16, 8
EXPERIMENTS = {
    "autoencoding": openmoji_autoencoder,
    "denoising": openmoji_text,
    "classifying": openmoji_classifier,
    "prior": openmoji_prior,
    "distillation": openmoji_few_steps,
}


def make_config(task, **fields):
    """The smoke variant of a task's experiment, smaller still, with some fields changed."""
    config = EXPERIMENTS[task].get_config("smoke")
    config.data.image_size = SIZE
    config.batch_size = BATCH
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 0
    config.autoencoder.update(
        {"channel_mult": (1, 1), "num_groups": 4, "embed_dim": 2, "z_channels": 2}
    )
    config.autoencoding.discriminator.num_layers = 1
    config.autoencoding.disc_start = config.autoencoding.adversarial_start = 0
    config.unet.update({"model_channels": 8, "channel_mult": (1,), "num_groups": 4})
    config.ema_decay = 0.9
    openmoji_text.of_v(config)  # since a flow fixes its schedule and its prediction
    if "word_map" in config.conditioners:  # nobody else's models have one
        del config.conditioners["word_map"]
    config.update_from_flattened_dict(fields)
    return config


def make_batch(config):
    """Random pictures and conditions."""
    rng = np.random.default_rng(0)
    batch = {"image": rng.uniform(-1, 1, (BATCH, SIZE, SIZE, 3)).astype(np.float32)}
    for key, spec in batch_spec(config).items():
        if key != "image":
            batch[key] = rng.integers(0, 9, spec.shape).astype(np.int32)
    return batch
