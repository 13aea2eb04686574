"""Measures whether samples look like random crops, with and without the condition on crops.

    python -m demo.crops --workdir=runs/crops

The workdir has the runs of configs/openmoji_crops.py: told/ has this condition, untold/ doesn't.
Writes a table, crops.json, and a picture, crops.png, into it.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jaxtyping import Float, UInt8

from demo.openmoji import draw_with_prompts
from latent_diffusion import data
from latent_diffusion.generation.loading import load
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.runtime.startup import quiet_and_cached

COUNT = 256  # pictures of each row
SHOWN = 16


def ink(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N H W"]:
    """How far each pixel is from white, in [0, 1]."""
    return 1 - images.min(-1) / 255.0


def off_centre(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Distance of the ink's centre of mass from the middle, as a share of the picture's side.

    White pictures have no centre and are left out.
    """
    amount = ink(images)
    amount = amount[amount.sum((1, 2)) > 0]
    places = [(np.arange(n) + 0.5) / n - 0.5 for n in amount.shape[1:]]
    total = amount.sum((1, 2))
    down = (amount * places[0][:, None]).sum((1, 2)) / total
    right = (amount * places[1]).sum((1, 2)) / total
    return np.hypot(down, right)


def is_cut(images: UInt8[np.ndarray, "N H W 3"]) -> np.ndarray:
    """Whether, on one of the four borders, more than an eighth of the pixels has ink: bool [N]."""
    inked = ink(images) > 0.25
    borders = (inked[:, 0], inked[:, -1], inked[:, :, 0], inked[:, :, -1])
    return np.stack([border.mean(-1) > 1 / 8 for border in borders]).any(0)


def evaluate(root: Path) -> dict[str, dict[str, float]]:
    """Measure both models, draw crops.png, write crops.json; returns the numbers by row."""
    config = workdir.load_config(root / "told")
    side = config.data.image_size
    source = data.make_source(config.data, "train")
    transform = data.make_transform(config.data, train=True)
    order = np.random.default_rng(0).permutation(len(source))
    examples = [source[int(i)] for i in order]
    whole = [e["image"] for e in examples if e["image"].shape[:2] == (side, side)][:COUNT]
    crops = [transform(e, np.random.default_rng(i)) for i, e in enumerate(examples[:COUNT])]
    informed, uninformed = (load(root / name) for name in ("told", "untold"))
    rng, wide = jax.random.key(0), {"original_size": (side, 2 * side)}
    rows = {
        "whole drawings": np.stack(whole),
        "training crops": to_uint8(np.stack([example["image"] for example in crops])),
        "untold": uninformed.sample(rng, num_images=COUNT),
        "told: whole": informed.sample(rng, num_images=COUNT),
        "told: left end": informed.sample(rng, num_images=COUNT, crop_top_left=(0, 2), **wide),
        "told: right end": informed.sample(
            rng, num_images=COUNT, crop_top_left=(0, side - 2), **wide
        ),
    }
    rows = {name: x if x.dtype == np.uint8 else to_uint8(x) for name, x in rows.items()}
    numbers = {
        name: {"off_centre": float(off_centre(x).mean()), "cut": float(is_cut(x).mean())}
        for name, x in rows.items()
    }
    shown = [(name, x[:SHOWN]) for name, x in rows.items()]
    draw_with_prompts(shown, scale=3).save(root / "crops.png")
    (root / "crops.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


def main(argv: list[str]) -> None:
    """Evaluate and print the rows of a Markdown table."""
    quiet_and_cached()
    try:
        numbers = evaluate(Path(WORKDIR.value))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, row in numbers.items():
        print(f"| {name} | {row['off_centre']:.3f} | {row['cut']:.0%} |")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", "runs/crops", "Folder of told/ and untold/.")
    app.run(main)
