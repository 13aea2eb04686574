"""Train either stage.

    python train.py --config=configs/X.py[:variant] --workdir=DIR [--config.key=value]

The same workdir again resumes. The work is in `latent_diffusion.training`.
"""

from latent_diffusion.training.__main__ import run

if __name__ == "__main__":
    run()
