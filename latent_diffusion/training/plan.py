"""Plan a large run: which part limits it, and how long it takes, from counts and published rates.

    python -m latent_diffusion.training.plan --config=configs/X.py --topology=v5e:16x16 \
        --images=170000000

Nothing is compiled, and no accelerator is needed. Every time is a lower bound: arithmetic at the
chip's peak, state and gradients once through memory and network, pictures decoded by all cores of
the hosts, at the rate of one core of this machine, and read at --storage_rate. Recomputation
(`remat`), activations in memory and waiting cost extra time, so a run takes longer. `compile_check`
shows the compiler's result for a step. --facts=FILE stores the counts, which take a minute for the
largest networks. See docs/scale.md.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from latent_diffusion.runtime import flags as shared_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment config.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8 ...")
IMAGES = flags.DEFINE_integer("images", None, "Pictures of the data set.", lower_bound=1)
PER_CORE = flags.DEFINE_float(
    "images_per_core",
    None,
    "Pictures per second that a core prepares; by default measured.",
    lower_bound=1e-3,
)
PICTURE = flags.DEFINE_float("picture_kb", 107.0, "Size of a stored picture, as ImageNet's JPEGs.")
STORAGE = flags.DEFINE_float(
    "storage_rate", 1.0, "GB/s that a host reads from its storage.", lower_bound=1e-3
)
FACTS = flags.DEFINE_string("facts", None, "JSON file that stores the counts.")


def main(_: list[str]) -> None:
    """Read the flags, count, print."""
    import jax

    from latent_diffusion.training import planning

    jax.config.update("jax_platforms", "cpu")
    config = CONFIG.value
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        parts, shares = planning.cuts(config.parallel, str(TOPOLOGY.value))
        facts = planning.known_facts(config, planning.key(name, config), FACTS.value)
        if PER_CORE.value:
            facts = facts._replace(images_per_core=PER_CORE.value)
        run = planning.plan(
            facts,
            str(TOPOLOGY.value),
            batch_size=config.batch_size,
            num_steps=config.num_steps,
            images=int(IMAGES.value or 1),
            parts=parts,
            shares=shares,
            checkpoint_steps=config.checkpoint.every_steps,
            picture=1e3 * PICTURE.value,
            storage_rate=1e9 * STORAGE.value,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(planning.report(run, str(TOPOLOGY.value), config.batch_size))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology", "images"])
    shared_flags.run(main)
