"""Sample from a trained model.

    python sample.py --workdir=DIR|--model=PATH --out=DIR --prompts="a;b"

The work is in `latent_diffusion.generation`.
"""

from latent_diffusion.generation.__main__ import run

if __name__ == "__main__":
    run()
