"""Encode the pictures of an experiment once, into a folder for any number of training runs.

    python -m latent_diffusion.encode --config=configs/X.py --out=DIR|gs://… [--config.key=value]

The config is that of the later training: its data, first stage and conditions. Then train with
--config.data.name=latents --config.data.dir=DIR. Every process encodes its share of the shards on
its devices (--distributed: docs/devices.md). A shard appears when it is complete, and the same
command resumes where it was stopped.
"""

from absl import flags
from ml_collections import config_flags

from latent_diffusion.runtime import flags as shared_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment config.", lock_config=True)
OUT = flags.DEFINE_string(
    "out", None, "Folder or URL (gs://…) of the shards, which all processes share."
)
DTYPE = flags.DEFINE_string("dtype", "float32", "Type of moments, texts: float32 | bfloat16.")
CROPS = flags.DEFINE_integer("crops", 1, "Windows of each picture, for data.crop=random.")
SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Pictures in a shard.")
SPLITS = flags.DEFINE_list("splits", ["train", "test"], "Splits to write; test has pictures.")
connect = shared_flags.cluster()


def main(argv: list[str]) -> None:
    """Read the flags, encode."""
    from latent_diffusion.runtime import processes
    from latent_diffusion.runtime.startup import quiet_and_cached
    from latent_diffusion.training import encoding
    from latent_diffusion.training.loop import USER_ERRORS

    quiet_and_cached()
    try:
        connect()
        options = (DTYPE.value, CROPS.value, SHARD_SIZE.value, SPLITS.value)
        encoding.encode(CONFIG.value, str(OUT.value), *options)
    except USER_ERRORS as error:
        processes.exit_with(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    shared_flags.run(main)
