"""The numbers and pictures at the end of `make demo`.

    python -m demo.openmoji --workdir=runs/demo

Writes metrics.json, reconstructions.png, samples.png and losses.png into the workdir, which has the
trained first_stage/ and denoiser/.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

from demo.judged import PER_SUBJECT, Coloured, Diverse, Judged, first_caption
from latent_diffusion import data
from latent_diffusion.generation.loading import load
from latent_diffusion.generation.model import Model
from latent_diffusion.nets.losses.similarity import psnr
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.metrics import image_grid, to_uint8
from latent_diffusion.runtime.startup import quiet_and_cached

SEEN = (
    "red heart",
    "grinning face",
    "dog face",
    "red apple",
    "sun",
    "flag: Japan",
    "woman police officer light skin tone",
    "man farmer dark skin tone",
)
HELD_OUT = (
    "woman firefighter dark skin tone",
    "woman firefighter light skin tone",
    "woman pilot medium skin tone",
    "man judge medium-dark skin tone",
    "woman superhero medium-light skin tone",
    "man police officer dark skin tone",
    "woman farmer light skin tone",
    "man technologist medium skin tone",
)
COLUMNS = 8


def in_batches(function: Callable[[Any], Any], images: np.ndarray, size: int = 32) -> np.ndarray:
    """`function` of all images, `size` at a time; the last batch is padded with the last image."""
    index = np.minimum(np.arange(len(images) + -len(images) % size), len(images) - 1)
    parts = [np.asarray(function(images[part])) for part in index.reshape(-1, size)]
    return np.concatenate(parts)[: len(images)]


def reconstructions(model: Model, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Decoded posterior modes of images in [-1, 1]."""
    return in_batches(lambda part: model.decode(model.encode(part)), images, batch_size)


def draw_with_prompts(rows: list[tuple[str, np.ndarray]], scale: int = 2) -> Image.Image:
    """A row of pictures for each prompt, with the prompt at its left."""
    font = ImageFont.load_default(size=14)
    grids = [Image.fromarray(image_grid(images, len(images))) for _, images in rows]
    grids = [g.resize((g.width * scale, g.height * scale), Image.Resampling.NEAREST) for g in grids]
    margin = max(int(font.getlength(prompt)) for prompt, _ in rows) + 20
    height = grids[0].height
    sheet = Image.new("RGB", (margin + grids[0].width, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((prompt, _), grid) in enumerate(zip(rows, grids, strict=True)):
        pen.text((10, i * height + height // 2), prompt, fill="black", font=font, anchor="lm")
        sheet.paste(grid, (margin, i * height))
    return sheet


def draw_losses(root: Path) -> None:
    """losses.png: the curves of both stages, from their metrics.jsonl."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    stage_1, stage_2 = (
        [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first_stage", "denoiser")
    )
    for axis, records, names, title in (
        (axes[0], stage_1, ("l1", "lpips"), "perceptual compression: reconstruction"),
        (axes[1], stage_1, ("logits_real", "logits_fake"), "perceptual compression: PatchGAN"),
        (axes[2], stage_2, ("loss",), "latent denoising"),
    ):
        for name in names:
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(root / "losses.png", dpi=100)
    plt.close(figure)


def measure_first_stage(
    model: Model, examples: list[dict[str, Any]], coloured: Coloured, root: Path
) -> dict[str, float]:
    """Errors of reconstructed held-out examples, and their colours; draws reconstructions.png."""
    x = np.stack([e["image"] for e in examples]).astype(np.float32) / 127.5 - 1
    x_rec = reconstructions(model, x)
    shown = np.linspace(0, len(x) - 1, 32).round().astype(int)
    pairs = np.concatenate([np.concatenate([x[i], x_rec[i]], 0)[None] for i in shown])
    _enlarged(image_grid(pairs, 16)).save(root / "reconstructions.png")
    plain = np.stack([*coloured.real.values()]).astype(np.float32) / 127.5 - 1
    plain_rec = to_uint8(reconstructions(model, plain))
    return {
        "reconstruction_psnr": float(np.mean(psnr(x, np.clip(x_rec, -1, 1)))),
        "colour_accuracy_reconstructions": coloured.accuracy(plain_rec, [*coloured.real]),
    }


def evaluate(root: Path) -> dict[str, float]:
    """Measure both stages of a demo, draw its pictures, write metrics.json; returns the numbers."""
    config = workdir.load_config(root / "denoiser")
    model = load(root / "denoiser")
    sources = (data.make_source(config.data, split) for split in ("train", "test"))
    train, test = ([source[i] for i in range(len(source))] for source in sources)
    coloured = Coloured([*train, *test])
    numbers = measure_first_stage(model, test, coloured, root)

    # The judges, fitted on real training pictures.
    judged, captions = Judged(train), [first_caption(e) for e in test]
    held_out = np.stack([e["image"] for e in test])
    groups = [e["class_label"] for e in test]
    numbers["tone_accuracy_real_held_out"] = judged.tone_accuracy(held_out, captions)
    numbers["group_accuracy_real_held_out"] = judged.group_accuracy(held_out, groups)

    # Stage 2, on held-out combinations, training captions, colours and prompts without a style.
    def draw(key: int, prompts: Sequence[str], num_images: int = 1) -> np.ndarray:
        """Samples [prompts num_images H W 3]."""
        drawn = model.sample(jax.random.key(key), prompts, num_images=num_images, batch_size=120)
        return to_uint8(drawn).reshape(len(prompts), num_images, *drawn.shape[1:])

    start = time.perf_counter()
    samples = draw(0, judged.prompts)[:, 0]
    numbers["samples_per_second"] = len(samples) / (time.perf_counter() - start)
    tone, group = judged.accuracies(samples)
    numbers["tone_accuracy_held_out_combinations"] = tone
    numbers["group_accuracy_training_captions"] = group
    plain = draw(2, coloured.prompts)[:, 0]
    numbers["colour_accuracy"] = coloured.accuracy(plain, coloured.prompts)
    if judged.styles:
        diverse = Diverse(train)
        numbers["style_accuracy_real_held_out"] = judged.style_accuracy(held_out, captions)
        numbers["style_accuracy"] = judged.style_accuracy(samples, judged.prompts)
        numbers["diversity"] = diverse.diversity(draw(3, diverse.prompts, PER_SUBJECT))
    titles = [*SEEN, *(f"{prompt}  (held out)" for prompt in HELD_OUT)]
    drawn = draw(1, [*SEEN, *HELD_OUT], COLUMNS)
    scale = max(1, 64 // config.data.image_size)
    draw_with_prompts(list(zip(titles, drawn, strict=True)), scale).save(root / "samples.png")
    draw_losses(root)
    (root / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


def _enlarged(image: np.ndarray, scale: int = 2) -> Image.Image:
    picture = Image.fromarray(image)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    quiet_and_cached()
    root = Path(WORKDIR.value)
    try:
        numbers = evaluate(root)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, value in numbers.items():
        print(f"{name:40s} {value:8.3f}")
    for name in ("reconstructions.png", "samples.png", "losses.png", "metrics.json"):
        print(root / name)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of first_stage/ and denoiser/.")
    app.run(main)
