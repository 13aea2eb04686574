"""Sample from a trained model.

    python sample.py --workdir=DIR|--model=PATH --out=DIR --prompts="a;b"

Writes 00000.png … in prompt-major order, grid.png, samples.npz and prompts.txt.
"""

import sys
from pathlib import Path

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "A workdir of latent denoising.")
MODEL = flags.DEFINE_string("model", None, "Any other path that latent_diffusion.load reads.")
OUT = flags.DEFINE_string("out", None, "Where the images go.", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "Prompts, separated by semicolons.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line.")
CLASS_LABELS = flags.DEFINE_list("class_labels", None, "Class ids, separated by commas.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Images per prompt or class.")
SEED = flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i only.")
SAMPLER = flags.DEFINE_string("sampler", None, "Default: the model's own.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Default: the model's own.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: the model's own.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images sampled at once.")


def main(argv: list[str]) -> None:
    """Read the flags; the work is `latent_diffusion.sampling`."""
    from latent_diffusion import sampling
    from latent_diffusion.startup import quiet_and_cached

    quiet_and_cached()

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise app.UsageError("give either --workdir or --model")
    options = {
        "sampler": SAMPLER.value,
        "num_steps": NUM_STEPS.value,
        "guidance_scale": GUIDANCE_SCALE.value,
    }
    try:
        sampling.sample_to_disk(
            WORKDIR.value or MODEL.value,
            Path(OUT.value),
            prompts=sampling.read_prompts(PROMPTS.value, PROMPTS_FILE.value),
            class_labels=sampling.read_labels(CLASS_LABELS.value),
            num_images=NUM_IMAGES.value,
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
