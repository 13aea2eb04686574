"""A small run that does everything, and one of the two processes that do it together."""

import sys

import numpy as np

from configs import openmoji_autoencoder, openmoji_text
from latent_diffusion.evaluate.__main__ import evaluate
from latent_diffusion.generation import sampling
from latent_diffusion.runtime import processes
from latent_diffusion.runtime.startup import quiet_and_cached
from latent_diffusion.training import loop

STEPS = 8
FIELDS = {  # everything that a run does, on as little as possible
    "autoencoder.regularization": "identity",
    "data.image_size": 8,
    "unet.model_channels": 8,
    "unet.channel_mult": (1,),
    "unet.attention_resolutions": (),
    "unet.num_groups": 4,
    "sampling.num_steps": 1,
    "first_stage.num_batches": 1,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.eps": 1e-2,
    "log.eval_every_steps": 4,
    "log.images_every_steps": 8,
    "log.num_images": 2,
}
FIRST_STAGE_FIELDS = {
    "data.image_size": 16,
    "autoencoder.channels": 8,
    "autoencoder.channel_mult": (1,),
    "autoencoder.attn_resolutions": (),
    "autoencoder.num_groups": 4,
    "autoencoding.perceptual": "none",
    "log.eval_every_steps": 2,
}
LOOKED_AT = {"log.distance": "alexnet", "log.distance_images": 24, "log.num_images": 2}
BEST = {"checkpoint.best": "eval_fd_alexnet"}
# Steps enough that something of each image's own noise is left.
SAMPLING = {"prompts": ["red circle", "blue square"], "num_images": 3, "num_steps": 4}


def make_config(num_steps=STEPS, **fields):
    config = openmoji_text.get_config("smoke")
    config.update_from_flattened_dict({**FIELDS, "num_steps": num_steps, **fields})
    return config


def train_both(workdir, **fields):
    """Both stages to the last step, with distances, pictures and best checkpoints."""
    fields |= LOOKED_AT | BEST
    config = openmoji_autoencoder.get_config("smoke")
    config.update_from_flattened_dict({**FIRST_STAGE_FIELDS, "num_steps": 3, **fields})
    loop.train(config, workdir / "first_stage")
    loop.train(make_config(**fields), workdir / "denoiser")


def main_both(workdir, coordinator, process_id, mode):
    """Train both stages on two processes, then go on with what one process has begun."""
    quiet_and_cached()
    processes.connect(False, coordinator, 2, int(process_id), 200)
    train_both(workdir, **{"parallel.mode": mode})
    loop.train(make_config(**{"parallel.mode": mode}), workdir / "begun")


def score(workdir):
    """The Fréchet distance of 24 samples to a normal distribution."""
    reference = workdir / "statistics.npz"
    if not reference.exists():
        np.savez(reference, mu=np.zeros(256), sigma=np.eye(256))
    options = {"metrics": ["fd"], "features": "alexnet", "num_images": 24, "batch_size": 8}
    return evaluate(workdir=str(workdir), reference=str(reference), **options)["metrics"]


def main(workdir, coordinator, process_id):
    """Train until SIGTERM comes, then sample and score what there is; refuse to do so unequally."""
    quiet_and_cached()
    processes.connect(False, coordinator, 2, int(process_id), 200)
    try:
        loop.train(make_config(num_steps=1_000_000), workdir)
    except loop.Interrupted as interrupted:
        print(f"exit code {interrupted.exit_code}", file=sys.stderr)
    sampling.sample_to_disk(workdir, workdir / "samples", **SAMPLING)
    score(workdir)
    own = {"seed": int(process_id)}
    for call in (
        lambda: sampling.sample_to_disk(workdir, workdir / "other", **SAMPLING, **own),
        lambda: evaluate(workdir=str(workdir), metrics=["fd"], **own),
    ):
        try:
            call()
        except ValueError as error:
            print(f"refused: {error}", file=sys.stderr)
