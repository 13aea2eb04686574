"""First stages side by side: a Markdown table and a picture of held-out reconstructions.

    python -m latent_diffusion.evaluation.first_stages --root=runs/first_stages

Every folder in the root is a workdir of perceptual compression that
`python -m latent_diffusion.evaluate --workdir=...` has scored.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from latent_diffusion import data, workdir
from latent_diffusion.evaluation.openmoji import draw_with_prompts, reconstructions
from latent_diffusion.loading import load
from latent_diffusion.metrics import to_uint8
from latent_diffusion.startup import quiet_and_cached

ROOT = flags.DEFINE_string("root", "runs/first_stages", "Holds the workdirs to compare.")

COLUMNS = ("PSNR", "SSIM", "LPIPS", "latent std", "codes in use", "s/step", "parameters")
SHOWN = 12


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(
            f"{path} is missing: train, then python -m latent_diffusion.evaluate "
            f"--workdir={path.parent}"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(directory: Path) -> list[str]:
    """The cells of COLUMNS for one workdir, from what its training and evaluation logged."""
    config = workdir.load_config(directory)
    trained = _records(directory / "metrics.jsonl")
    scores = _records(directory / "evaluations.jsonl")[-1]["metrics"]
    last = trained[-1]
    speed = np.median([r["images_per_second"] for r in trained if r.get("images_per_second")])
    params = workdir.load_autoencoder_params(directory, config)
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6
    usage = last.get("codebook_usage")
    return [
        f"{scores['psnr']:.2f}",
        f"{scores['ssim']:.3f}",
        f"{scores['lpips_alex']:.4f}",
        f"{last['latent_std']:.2f}",
        "–" if usage is None else f"{usage:.0f} of {config.autoencoder.num_codes}",
        f"{config.batch_size / speed:.2f}",
        f"{size:.2f} M",
    ]


def compare(root: Path) -> str:
    """The table; writes reconstructions.png into the root. ValueError where there is no workdir."""
    directories = sorted(path.parent for path in root.glob("*/config.json"))
    if not directories:
        raise ValueError(f"{root} holds no workdir")
    config = workdir.load_config(directories[0])
    source = data.make_source(config.data, "test")
    picked = np.linspace(0, len(source) - 1, SHOWN).round().astype(int)
    originals = np.stack([source[i]["image"] for i in picked])
    pictures = [("original", originals)]
    lines = [
        f"| first stage | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for directory in directories:
        lines.append(f"| {directory.name} | {' | '.join(row(directory))} |")
        x_rec = reconstructions(load(directory), originals.astype(np.float32) / 127.5 - 1)
        pictures.append((directory.name, to_uint8(x_rec)))
    draw_with_prompts(pictures, scale=1).save(root / "reconstructions.png")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Compare and print."""
    quiet_and_cached()
    print(compare(Path(ROOT.value)))
    print(Path(ROOT.value) / "reconstructions.png")


if __name__ == "__main__":
    app.run(main)
