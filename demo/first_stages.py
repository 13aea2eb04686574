"""Compares first stages: a Markdown table and a picture of held-out reconstructions.

    python -m demo.first_stages --root=runs/first_stages

Every folder in the root is the workdir of a first stage after `python -m latent_diffusion.evaluate
--workdir=...`. The standard deviation of the latents and the number of used codes are over all
held-out pictures.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from demo.openmoji import draw_with_prompts, in_batches, reconstructions
from latent_diffusion import data
from latent_diffusion.generation.loading import load
from latent_diffusion.generation.model import Model
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.runtime.startup import quiet_and_cached

ROOT = flags.DEFINE_string("root", "runs/first_stages", "Folder of the workdirs to compare.")

COLUMNS = ("PSNR", "SSIM", "LPIPS", "latent std", "codes in use", "s/step", "parameters")
SHOWN = 12


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(
            f"{path} is missing: train, then python -m latent_diffusion.evaluate "
            f"--workdir={path.parent}"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(directory: Path, model: Model, images: np.ndarray) -> list[str]:
    """The cells of COLUMNS for one workdir, from its logs and its latents of images [N H W 3]."""
    config = workdir.load_config(directory)
    trained = _records(directory / "metrics.jsonl")
    scores = _records(directory / "evaluations.jsonl")[-1]["metrics"]
    speed = np.median([r["images_per_second"] for r in trained if r.get("images_per_second")])
    first_stage = model.first_stage
    assert first_stage is not None
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(first_stage.params)) / 1e6
    usage = "–"
    if config.autoencoder.regularization in ("vq", "gumbel"):
        used = len(np.unique(in_batches(model.encode_to_indices, images)))
        usage = f"{used} of {config.autoencoder.num_codes}"
    return [
        f"{scores['psnr']:.2f}",
        f"{scores['ssim']:.3f}",
        f"{scores['lpips_alex']:.4f}",
        f"{in_batches(model.encode, images).std():.2f}",
        usage,
        f"{config.batch_size / speed:.2f}",
        f"{size:.2f} M",
    ]


def compare(root: Path) -> str:
    """The table; writes reconstructions.png into the root. ValueError if it has no workdir."""
    directories = sorted(path.parent for path in root.glob("*/config.json"))
    if not directories:
        raise ValueError(f"{root} holds no workdir")
    source = data.make_source(workdir.load_config(directories[0]).data, "test")
    originals = np.stack([source[i]["image"] for i in range(len(source))])
    images = originals.astype(np.float32) / 127.5 - 1
    picked = np.linspace(0, len(source) - 1, SHOWN).round().astype(int)
    pictures = [("original", originals[picked])]
    lines = [
        f"| first stage | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for directory in directories:
        model = load(directory)
        lines.append(f"| {directory.name} | {' | '.join(row(directory, model, images))} |")
        x_rec = reconstructions(model, images[picked])
        pictures.append((directory.name, to_uint8(x_rec)))
    draw_with_prompts(pictures, scale=1).save(root / "reconstructions.png")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Compare and print."""
    quiet_and_cached()
    try:
        print(compare(Path(ROOT.value)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(Path(ROOT.value) / "reconstructions.png")


if __name__ == "__main__":
    app.run(main)
