"""The table and pictures of docs/few_steps.md, which compare a distilled student with its teacher.

    python -m demo.few_steps --teacher=runs/demo/denoiser --student=runs/demo/few_steps
        --phased=runs/demo/phased --preview=runs/demo/preview

Writes few_steps.json and few_steps.png into the student's workdir. Fréchet distances are of the
features of AlexNet, between samples for captions of the test split and the training pictures (fd)
or the first stage's reconstructions of these (fd_reconstructed); most of fd comes from the first
stage's errors. Standard errors are by the jackknife. The judge of `demo.judge` measures accuracies.
--phased adds a student of four phases; --preview also decodes the students' samples by a tiny
decoder.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from demo.judged import Judged
from demo.openmoji import HELD_OUT, SEEN, draw_with_prompts
from latent_diffusion import data
from latent_diffusion.evaluate import generate
from latent_diffusion.evaluate.collect import collect_features
from latent_diffusion.evaluate.features import make_features
from latent_diffusion.evaluate.frechet import gaussian, measure_frechet
from latent_diffusion.evaluate.reconstruction import collect_reconstructions
from latent_diffusion.generation.loading import load
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import tree_hash
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.runtime.startup import quiet_and_cached

SHOWN = (*SEEN[:5], *HELD_OUT[:3])
BATCH, SEEDS = 128, 4  # images at once; sets of samples for the judge
# name of a row -> the model that draws, and its options
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher, DDIM, 20 steps": ("teacher", {"sampler": "ddim", "num_steps": 20}),
    "phased student, 4": ("phased", {}),
    "phased student, 4, tiny decoder": ("phased_fast", {}),
}
for steps in (4, 2, 1):
    ROWS |= {
        f"student, {steps}": ("student", {"num_steps": steps}),
        f"student, {steps}, tiny decoder": ("student_fast", {"num_steps": steps}),
        f"DDIM, {steps}": ("teacher", {"sampler": "ddim", "num_steps": steps}),
        f"DPM++, {steps}": ("teacher", {"sampler": "dpm_solver_pp_2m", "num_steps": steps}),
    }


def evaluate(
    teacher: Path, student: Path, phased: Path | None, preview: Path | None, count: int
) -> dict[str, dict[str, float]]:
    """Measure all rows and draw the pictures; returns the numbers by row."""
    models = {"teacher": load(teacher), "student": load(student)}
    if phased is not None:
        models["phased"] = load(phased)
    if preview is not None:
        tiny = load(preview).first_stage
        for name in {"student", "phased"} & models.keys():
            models[f"{name}_fast"] = models[name].replace(first_stage=tiny)
    config = workdir.load_config(teacher)
    train, test = (data.make_source(config.data, split) for split in ("train", "test"))
    judged = Judged([train[i] for i in range(len(train))])
    net, cache = make_features("alexnet"), student / "evaluations"
    real = generate.of_data(config, "train")
    first_stage = models["teacher"].first_stage
    assert first_stage is not None  # every workdir has a first stage
    arrays = collect_reconstructions(
        first_stage, real.read, real.count, ["rfd"], cache / "few_steps_train", net=net
    )
    references = {
        "fd": gaussian(arrays["features"]), "fd_reconstructed": gaussian(arrays["features_rec"])
    }  # fmt: skip
    numbers, drawn = {}, []
    for row, (name_of_model, options) in ROWS.items():
        if name_of_model not in models:
            continue
        model = models[name_of_model]
        transform = data.make_transform(config.data, train=False)
        conditions = generate.conditions_of(model, test, transform, count, 0)
        made = generate.samples(model, conditions, count, 0, BATCH, **options)
        assert model.denoiser is not None
        weights = tree_hash(model.denoiser.params)[:12]
        folder = cache / f"few_steps_{''.join(filter(str.isalnum, row))}_{count}_{weights}"
        features = collect_features(made.read, count, net, folder)["features"]
        distances = {
            name: measure_frechet(features, reference, name)
            for name, reference in references.items()
        }
        draw = {"batch_size": BATCH, **options}
        model.sample(jax.random.key(1), judged.prompts, **draw)  # compiles
        start = time.perf_counter()
        keys = [jax.random.key(seed) for seed in range(SEEDS)]
        samples = [to_uint8(model.sample(key, judged.prompts, **draw)) for key in keys]
        rate = sum(map(len, samples)) / (time.perf_counter() - start)
        numbers[row] = {"images_per_second": rate}
        for name, distance in distances.items():
            numbers[row] |= {name: distance.value, f"{name}_error": distance.error}
        accuracies = np.mean([judged.accuracies(images) for images in samples], 0)
        numbers[row] |= dict(zip(("tone", "group"), map(float, accuracies), strict=True))
        shown = to_uint8(model.sample(jax.random.key(2), SHOWN, **options))
        drawn.append((row, shown))
        print(row, {name: round(value, 4) for name, value in numbers[row].items()}, flush=True)
    draw_with_prompts(drawn).save(student / "few_steps.png")
    (student / "few_steps.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


def main(argv: list[str]) -> None:
    """Evaluate; each row is printed when it is measured."""
    quiet_and_cached()
    try:
        phased, preview = (Path(v) if v else None for v in (PHASED.value, PREVIEW.value))
        evaluate(Path(TEACHER.value), Path(STUDENT.value), phased, preview, COUNT.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    TEACHER = flags.DEFINE_string("teacher", "runs/demo/denoiser", "The teacher's workdir.")
    STUDENT = flags.DEFINE_string("student", "runs/demo/few_steps", "The student's workdir.")
    PHASED = flags.DEFINE_string("phased", None, "The workdir of a student of four phases.")
    PREVIEW = flags.DEFINE_string("preview", None, "A tiny decoder's workdir, for further rows.")
    COUNT = flags.DEFINE_integer("num_images", 2048, "Samples of each row.")
    app.run(main)
