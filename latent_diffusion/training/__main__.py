"""Train either stage.

    python train.py --config=configs/X.py[:variant] --workdir=DIR [--config.key=value]

The same command with the same workdir resumes. --dry_run describes the run without starting it:
config, parameters, sharding, memory and FLOPs. On several hosts: --distributed, see
docs/devices.md.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from latent_diffusion.runtime import flags as shared_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment config.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and images go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Describe the run instead of starting it.")
connect = shared_flags.cluster()


def main(argv: list[str]) -> None:
    """Run `latent_diffusion.training.loop`, and print errors that a user can fix in one line."""
    from latent_diffusion.runtime import processes
    from latent_diffusion.runtime.startup import quiet_and_cached
    from latent_diffusion.training import loop
    from latent_diffusion.training.dry_run import dry_run

    quiet_and_cached()

    if not (WORKDIR.value or DRY_RUN.value):
        raise app.UsageError("--workdir is needed (or --dry_run)")
    try:
        if DRY_RUN.value:
            print(dry_run(CONFIG.value))
            return
        connect()
        loop.train(CONFIG.value, str(WORKDIR.value))
    except loop.Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except loop.USER_ERRORS as error:
        processes.exit_with(f"error: {error}")


def run() -> None:
    """The command."""
    flags.mark_flag_as_required("config")
    shared_flags.run(main)


if __name__ == "__main__":
    run()
