"""Train either stage.

    python train.py --config=configs/X.py[:variant] --workdir=DIR [--config.key=value]

The same workdir again resumes. --dry_run prints the resolved config and the parameter counts.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment config.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and images go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config and parameter counts, then stop.")


def main(argv: list[str]) -> None:
    """Parse nothing, decide nothing: the work is `latent_diffusion.loop`."""
    from latent_diffusion import loop
    from latent_diffusion.startup import quiet_and_cached

    quiet_and_cached()

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    if DRY_RUN.value:
        print(loop.dry_run(CONFIG.value))
        return
    if not WORKDIR.value:
        raise app.UsageError("--workdir is needed (or --dry_run)")
    try:
        loop.train(CONFIG.value, WORKDIR.value)
    except loop.Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except loop.USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
