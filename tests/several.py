"""A small run that does everything, and what several processes do with it together.

It is also a config file: train.py --config=tests/several.py
"""

import itertools
import os
import runpy
import signal
import sys
import time

import numpy as np
from ml_collections import ConfigDict

from configs import openmoji_autoencoder, openmoji_text
from latent_diffusion.data import shards
from latent_diffusion.generation import sampling
from latent_diffusion.runtime import partners, processes
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.runtime.startup import quiet_and_cached
from latent_diffusion.training import encoding, loop
from latent_diffusion.training.evaluator import Evaluator

STEPS = 8
FIELDS = {  # everything that a run does, on as little as possible
    "autoencoder.regularization": "identity",
    "data.image_size": 8,
    "unet.model_channels": 8,
    "unet.channel_mult": (1,),
    "unet.attention_resolutions": (),
    "unet.transformer_depth": 0,
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
    "autoencoding.discriminator.num_layers": 1,
    "optimizer.eps": 1e-2,
    "log.eval_every_steps": 2,
}
LOOKED_AT = {"log.distance": "alexnet", "log.distance_images": 48, "log.num_images": 2}
BEST = {"checkpoint.best": "eval_fd_alexnet"}
# Steps enough that something of each image's own noise is left.
SAMPLING = {"prompts": ["red circle", "blue square"], "num_images": 3, "num_steps": 4}
DEATH = 10  # seconds after which a process of `die_at` counts as dead


def get_config(variant=""):
    """The run without changes, for train.py."""
    config = openmoji_text.get_config("smoke")
    openmoji_text.of_v(config)  # one step of a guided flow turns rounding into other pixels
    config.conditioners = ConfigDict({"word_map": config.conditioners.word_map})
    config.update_from_flattened_dict({**FIELDS, "num_steps": STEPS})
    return config


def make_config(**fields):
    config = get_config()
    config.update_from_flattened_dict(fields)
    return config


def train_first_stage(workdir, **fields):
    """To the last step, with distances, pictures and the best checkpoint."""
    config = openmoji_autoencoder.get_config("smoke")
    fields = {**FIRST_STAGE_FIELDS, "num_steps": 3, **LOOKED_AT, **BEST, **fields}
    config.update_from_flattened_dict(fields)
    loop.train(config, workdir / "first_stage")


def train_denoiser(workdir, **fields):
    loop.train(make_config(**LOOKED_AT, **BEST, **fields), workdir / "denoiser")


def evaluate(workdir, **options):
    from latent_diffusion.evaluate import __main__ as command  # has flags named as train.py's

    return command.evaluate(workdir=str(workdir), **options)["metrics"]


def score(workdir, reference):
    """All distances of 24 samples to the pictures of a file."""
    options = {"metrics": ["fd", "kd", "pr", "dc"], "features": "alexnet"}
    options |= {"num_images": 24, "batch_size": 8, "reference": str(reference)}
    return evaluate(workdir, **options)


def join(coordinator, process_id, count=2):
    quiet_and_cached()
    processes.connect(False, coordinator, count, int(process_id), 200)


def main(workdir, coordinator, process_id):
    """One of two processes, which do together all that one can do; they refuse what differs."""
    join(coordinator, process_id)
    for mode in ("pmap", "mesh"):
        train_first_stage(workdir / mode, **{"parallel.mode": mode})
    for mode in ("pmap", "mesh"):
        train_denoiser(workdir / mode, **{"parallel.mode": mode})
    loop.train(make_config(**{"parallel.mode": "mesh"}, **LOOKED_AT), workdir / "begun")
    stop(workdir / "stopped", process_id)
    estimates = []
    watch = {"preview": lambda t, z_0: estimates.append(z_0)}
    sampling.sample_to_disk(workdir / "stopped", workdir / "samples", **SAMPLING, **watch)
    np.save(workdir / f"estimates_{process_id}.npy", estimates)
    score(workdir / "stopped", workdir / "reference.npz")
    own = {"seed": int(process_id)}
    for call in (
        lambda: sampling.sample_to_disk(workdir / "stopped", workdir / "other", **SAMPLING, **own),
        lambda: evaluate(workdir / "stopped", metrics=["fd"], **own),
    ):
        try:
            call()
        except ValueError as error:
            print(f"refused: {error}", file=sys.stderr)


def at_batch(act, number=1):
    """Do something before a batch of every evaluation, whose batches now take their time."""
    measure = Evaluator.measure

    def slowly(self, state, rng, stopped):
        batches = itertools.count()

        def asked():
            time.sleep(0.1)
            if next(batches) == number:
                act()
            return stopped()

        return measure(self, state, rng, asked)

    Evaluator.measure = slowly


def stop(workdir, process_id):
    """Train until one process gets SIGTERM in an evaluation of many batches."""
    measure = Evaluator.measure
    sends = process_id == "1"
    at_batch(lambda: sends and os.kill(os.getpid(), signal.SIGTERM))
    fields = {"num_steps": 1_000_000, "log.eval_batches": 15, "parallel.mode": "pmap"}
    try:
        loop.train(make_config(**fields), workdir)
    except loop.Interrupted as interrupted:
        print(f"exit code {interrupted.exit_code}", file=sys.stderr)
    Evaluator.measure = measure


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(workdir, coordinator, process_id):
    """train.py as a user starts it on two processes; one dies in the evaluation of step 4."""
    if process_id == "1":
        at_batch(die)
    flags = {"config": "tests/several.py", "config.log.eval_batches": 2, "workdir": workdir}
    flags |= {"coordinator": coordinator, "num_processes": 2, "process_id": process_id}
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
    runpy.run_path("train.py", run_name="__main__")


def encode_and_train(workdir, coordinator, process_id, dies_at):
    """Encode on two processes, of which each dies before an example of its own; then train."""
    join(coordinator, process_id)
    packed, examples = shards._packed, itertools.count()
    shards._packed = lambda e: die() if next(examples) == int(dies_at) else packed(e)
    config = make_config(**{"first_stage.cache": False})
    encoding.encode(config, workdir / "latents", shard_size=60)
    on_shards = {"data.name": "latents", "data.dir": str(workdir / "latents")}
    config.update_from_flattened_dict({**on_shards, "num_steps": 3, "log.images_every_steps": 0})
    loop.train(config, workdir / "denoiser")


def die_at(workdir, coordinator, process_id, victim, place):
    """One of two processes dies while the other one is in a save, in a barrier, or busy."""
    partners.TIMEOUT = DEATH
    join(coordinator, process_id)
    dies = process_id == victim
    processes.barrier("both are here")
    if place == "busy":
        time.sleep(0.5)
        die() if dies else time.sleep(600)
    if place == "barrier":
        die() if dies else processes.barrier("never met")
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        if dies:
            checkpoints._manager.save = lambda *_, **__: die()
        checkpoints.save(1, {"x": np.arange(8)})
