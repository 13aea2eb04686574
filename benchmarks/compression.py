"""How much should the first stage compress? Figs. 6 and 7 of the paper, at a small scale.

    python -m benchmarks.compression --workdir=runs/compression --minutes=20

For f = 16, 8, 4, 2 (the quickest first) and 1, pixel space: a first stage, a denoiser on it, and
the scores of its samples by several numbers of DDIM steps. All denoisers train for the same time:
first, steps of all denoisers and their sampling are timed, during which nothing else should run.
Writes results.json, table.md, plot.png and samples.png into the workdir. A second run omits the
work whose results are in results.json and resumes an interrupted training.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import compression_report as report
from benchmarks.compression_results import Results
from benchmarks.compression_timing import BATCH_SIZE, seconds_per_image, steps_in, timed
from configs.openmoji_compression import FACTORS, get_config
from latent_diffusion.evaluate import generate
from latent_diffusion.evaluate.collect import collect_features
from latent_diffusion.evaluate.features import FeatureNet, make_features
from latent_diffusion.evaluate.reconstruction import collect_reconstructions, score_reconstructions
from latent_diffusion.evaluate.scores import Reference, score
from latent_diffusion.generation.loading import load
from latent_diffusion.runtime import processes
from latent_diffusion.runtime.startup import quiet_and_cached
from latent_diffusion.training import loop

WORKDIR = flags.DEFINE_string("workdir", "runs/compression", "Where everything goes.")
MINUTES = flags.DEFINE_float("minutes", 20.0, "Training time of each denoiser.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Samples that each score is made of.")
PATIENCE = flags.DEFINE_float("patience", 10.0, "Leave out scores whose samples take more minutes.")
ONLY_TIME = flags.DEFINE_bool("only_time", False, "Stop after timing.")

NUM_STEPS = (10, 20, 50, 100, 200)  # of DDIM
FEATURES = "alexnet"
SHOWN = 10  # samples of each model in samples.png


def train_first_stage(f: int, root: Path, net: FeatureNet) -> dict[str, float]:
    """Train a first stage; PSNR and Fréchet distance of its held-out reconstructions."""
    workdir, config = root / f"first_stage_f{f}", get_config(f"first_stage_f{f}")
    loop.train(config, workdir)
    stage, images = load(workdir).first_stage, generate.of_data(config, "test")
    assert stage is not None
    arrays = collect_reconstructions(
        stage, images.read, images.count, ["psnr", "rfd"], workdir / "reconstructions", net=net
    )
    scores = score_reconstructions(arrays, "alex", FEATURES)
    return {"num_steps": config.num_steps, **{name: x.value for name, x in scores.items()}}


def train_denoiser(f: int, num_steps: int, root: Path) -> dict[str, float]:
    """Train a denoiser on latents that were encoded before; its steps and evaluated loss."""
    config = get_config(f"f{f}")
    if f > 1:
        config.first_stage.path = str(root / f"first_stage_f{f}")
    config.num_steps = num_steps
    loop.train(config, root / f"f{f}")
    lines = (root / f"f{f}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"num_steps": num_steps, "eval_loss": json.loads(lines[-1])["eval_loss"]}


def features_of_data(root: Path, net: FeatureNet) -> np.ndarray:
    """The features [N D] of all training pictures."""
    images = generate.of_data(get_config("f1"), "train")
    return collect_features(images.read, images.count, net, root / "real")["features"]


def score_samples(
    workdir: Path, num_steps: int, count: int, real: np.ndarray, net: FeatureNet
) -> dict[str, Any]:
    """Fréchet distance, precision and recall against the training pictures, with their errors."""
    folder = workdir / f"samples_{num_steps}"
    images = generate.samples(
        load(workdir), {}, count, 0, BATCH_SIZE, folder / "images", num_steps=num_steps
    )
    arrays = collect_features(images.read, count, net, folder / "features", BATCH_SIZE)
    return scored(arrays["features"], real)


def scored(features: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """The scores of some features, each with its error."""
    scores = score(["fd", "pr"], {"features": features}, Reference(features=real), FEATURES)
    return {name: [result.value, result.error] for name, result in scores.items()}


def some_of(real: np.ndarray, count: int) -> dict[str, Any]:
    """The scores of `count` real pictures: the bias of so few samples."""
    chosen = np.random.default_rng(0).choice(len(real), count, replace=False)
    return scored(real[chosen], real)


def compare(root: Path) -> None:
    """Train and score all models, the quickest first; write the report after each of them."""
    results = Results(root / "results.json")
    count, factors = NUM_IMAGES.value, FACTORS[::-1]
    results.check(minutes=MINUTES.value, num_images=count)
    for f in factors:
        results.get("timed", f, lambda f=f: timed(get_config(f"f{f}")))
    if ONLY_TIME.value:
        return
    net = make_features(FEATURES)
    real = features_of_data(root, net)
    results.get("real", count, lambda: some_of(real, count))
    for f in factors:
        speed = results.records["timed"][str(f)]
        if f > 1:
            results.get("first_stages", f, lambda f=f: train_first_stage(f, root, net))
        num_steps = steps_in(MINUTES.value, speed["seconds_per_step"])
        results.get("denoisers", f, lambda f=f, n=num_steps: train_denoiser(f, n, root))
        for n in NUM_STEPS:
            if seconds_per_image(speed, n) * count <= 60 * PATIENCE.value:
                work = (root / f"f{f}", n, count, real, net)
                results.get(f"scores_f{f}", n, lambda work=work: score_samples(*work))
        report.write(root, results.records, NUM_STEPS, SHOWN)


def main(argv: list[str]) -> None:
    """Compare; an error is one line."""
    quiet_and_cached()
    root = Path(WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    try:
        compare(root)
    except loop.Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except loop.USER_ERRORS as error:
        processes.exit_with(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
