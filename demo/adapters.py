"""The numbers and pictures of docs/adapters.md: adapters of small models of the demo's pictures.

    python -m demo.adapters --base=runs/demo/denoiser --control=runs/control
    python -m demo.adapters --base=runs/demo/denoiser --subject=runs/subject --prompt="it face"
    python -m demo.adapters --base=runs/style/base --style=runs/style/lora

For a control net, it measures the F1 of edges between samples and their hints, which are edges of
held-out pictures, also for the uncontrolled model at the same prompts, for both with empty prompts,
for reconstructions of the pictures, and for the next picture in the list. The sheet control.png
shows hint | samples | truth. For a subject, learned as a word or by DreamBooth, it measures the
share of samples whose nearest neighbour in the features of LPIPS is a picture of the subject, among
these and pictures of the training split; and the demo's judge on both models. For a style, it
measures the share of samples that a judge takes for Twemoji's, and another judge's accuracy on
their groups, for captions that weren't in the adapter's training, and both for reconstructions of
Twemoji's pictures of these captions; both judges are fitted on real pictures of both styles. The
sheet style.png shows a sample of the base | samples | Twemoji's. The numbers go to adapters.json in
the workdir of the adapter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import linen as nn
from jaxtyping import Float, UInt8

from demo import gallery, judge
from demo.judged import PER_GROUP, Judged, training_captions
from demo.openmoji import reconstructions
from latent_diffusion import data
from latent_diffusion.data import openmoji_source, windows
from latent_diffusion.data.sources import captions
from latent_diffusion.data.transforms import to_float
from latent_diffusion.generation.adapters import load_adapter
from latent_diffusion.generation.loading import load
from latent_diffusion.nets.losses.perceptual import LPIPS, load_lpips_params
from latent_diffusion.process.hints import edges
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.runtime.startup import quiet_and_cached

SAMPLES = 4  # per hint or caption
STYLES = ("openmoji", "twemoji")
HINTS = 64  # held-out pictures
OTHERS = 200  # pictures of the training split beside those of the subject
REACHES = {"edge_f1": 1, "edge_f1_exact": 0}  # pixels
TITLES = ("hint", "samples", "ground truth")
Pictures = UInt8[np.ndarray, "N H W 3"]


def edge_f1(
    samples: Float[np.ndarray, "N H W 3"], hints: Float[np.ndarray, "N H W 3"], reach: int = 1
) -> Float[np.ndarray, " N"]:
    """The F1 of each picture's edges; a hit is at most `reach` pixels from an edge of the hint.

    samples: in [-1, 1]. hints: white lines on black, in [0, 1].
    """
    side = 2 * reach + 1
    drawn, wanted = edges(samples)[..., :1], jnp.asarray(hints)[..., :1]
    near_drawn, near_wanted = (
        nn.max_pool(x, (side, side), padding="SAME") for x in (drawn, wanted)
    )

    def share(part: Any, of: Any) -> Any:
        return jnp.sum(part * of, (1, 2, 3)) / jnp.maximum(jnp.sum(part, (1, 2, 3)), 1)

    precision, recall = share(drawn, near_wanted), share(wanted, near_drawn)
    f1 = 2 * precision * recall / jnp.maximum(precision + recall, 1e-9)
    return np.asarray(f1)


def evaluate_control(base: Path, control: Path) -> dict[str, float]:
    """Measure a control net on held-out edges, and draw its sheet."""
    model, net = load(base), load_adapter(control)
    config = workdir.load_config(base)
    test = data.make_source(config.data, "test")
    places = np.linspace(0, len(test) - 1, min(HINTS, len(test))).round().astype(int)
    examples = [test[int(i)] for i in places]
    cut = data.make_transform(config.data, train=False)
    truth = np.stack([cut(example)["image"] for example in examples])
    prompts, hints = [example["caption"] for example in examples], np.asarray(edges(truth))
    repeated = np.repeat(hints, SAMPLES, 0)
    options = {"num_images": SAMPLES, "batch_size": 64}
    numbers, drawn = dict[str, float](), {}

    def measure(suffix: str, pictures: Any, wanted: Any) -> None:
        for name, reach in REACHES.items():
            numbers[f"{name}{suffix}"] = float(edge_f1(pictures, wanted, reach).mean())

    for suffix, texts in (("_empty_prompt", [""] * len(prompts)), ("", prompts)):
        controls = [(net, repeated, 1.0)]
        plain = model.sample(jax.random.key(0), texts, **options)
        drawn[suffix] = model.sample(jax.random.key(0), texts, controls=controls, **options)
        measure(suffix, drawn[suffix], repeated)
        measure(f"{suffix}_uncontrolled", plain, repeated)
    measure("_reconstructed", reconstructions(model, truth), hints)  # a perfect net
    measure("_of_the_next", np.roll(truth, 1, 0), hints)  # chance
    of_rows = to_uint8(drawn[""]).reshape(len(places), SAMPLES, *drawn[""].shape[1:])
    rows = [
        (to_uint8(2 * hint - 1), samples, to_uint8(picture))
        for hint, samples, picture in zip(hints, of_rows, truth, strict=True)
    ]
    gallery.sheet(rows[:: max(1, len(rows) // 8)][:8], TITLES).save(control / "control.png")
    return numbers


def nearest(samples: Pictures, references: Pictures, params: Any) -> np.ndarray:
    """The index of the reference nearest to each sample. params: of LPIPS("alex")."""

    @jax.jit
    def distances(sample: Any, references: Any) -> Any:
        repeated = jnp.broadcast_to(sample, references.shape)
        return LPIPS("alex").apply({"params": params}, repeated, references)

    scaled = np.stack([to_float(reference) for reference in references])
    return np.array([np.argmin(distances(to_float(sample), scaled)) for sample in samples])


def evaluate_subject(base: Path, subject: Path, prompt: str, count: int) -> dict[str, float]:
    """Measure how often a model draws its subject, and how well others, before and after."""
    models = {"before": load(base), "after": load(subject)}
    config, adapted = workdir.load_config(base), workdir.load_config(subject)
    train = data.make_source(config.data, "train")
    examples = [train[i] for i in range(len(train))]
    size = config.data.image_size
    pictures = data.make_source(adapted.data, "train")
    of_subject = [pictures[i]["image"] for i in range(len(pictures))]
    others = [examples[i]["image"] for i in np.linspace(0, len(examples) - 1, OTHERS).astype(int)]
    references = np.stack([windows.fit(x, (size, size)) for x in [*of_subject, *others]])
    samples = to_uint8(models["after"].sample(jax.random.key(0), [prompt], num_images=count))
    params = load_lpips_params("alex")
    of_base = to_uint8(models["before"].sample(jax.random.key(0), [prompt], num_images=count))
    numbers = {
        name: float((nearest(drawn, references, params) < len(of_subject)).mean())
        for name, drawn in (("recognised", samples), ("recognised_before", of_base))
    }
    judged = Judged(examples)
    for when, model in models.items():
        drawn = to_uint8(model.sample(jax.random.key(1), judged.prompts, batch_size=120))
        accuracies = zip(("tone", "group"), judged.accuracies(drawn), strict=True)
        numbers |= {f"{name}_accuracy_{when}": value for name, value in accuracies}
    return numbers


def both_styles(config: Any, split: str) -> tuple[list[dict[str, Any]], Pictures, np.ndarray]:
    """The examples of a split in both styles, their pictures, and their styles as numbers."""
    sources = [openmoji_source.of_styles(config, split, [style]) for style in STYLES]
    examples = [source[i] for source in sources for i in range(len(source))]
    pictures = np.stack([example["image"] for example in examples])
    return examples, pictures, np.repeat(np.arange(2), [len(source) for source in sources])


def evaluate_style(base: Path, style: Path) -> dict[str, float]:
    """Measure how often samples are in Twemoji's style and of their group; draw the sheet."""
    config, adapted = workdir.load_config(base), workdir.load_config(style)
    examples, pictures, styles = both_styles(config.data, "train")
    held_out, real, real_styles = both_styles(config.data, "test")
    of_style = judge.fit(pictures, styles)
    of_group = judge.fit(pictures, np.array([e["class_label"] for e in examples]))
    real_groups = np.array([e["class_label"] for e in held_out])
    numbers = {
        "style_accuracy_real": judge.balanced_accuracy(of_style, real, real_styles),
        "group_accuracy_real": judge.balanced_accuracy(of_group, real, real_groups),
    }
    truth = {e["caption"]: e["image"] for e, s in zip(examples, styles, strict=True) if s == 1}
    unseen = truth.keys() - set(captions(data.make_source(adapted.data, "train")))
    others = [e for e, s in zip(examples, styles, strict=True) if s == 0]
    prompts, labels = training_captions([e for e in others if e["caption"] in unseen], PER_GROUP)
    drawn = {}

    def measure(suffix: str, judged: Pictures, groups: Any) -> None:
        in_style = of_style.predict(judge.features(judged)) == 1
        numbers[f"of_the_style_{suffix}"] = float(in_style.mean())
        numbers[f"group_accuracy_{suffix}"] = judge.balanced_accuracy(of_group, judged, groups)

    for when, path in (("before", base), ("after", style)):
        model = load(path)
        samples = model.sample(jax.random.key(1), prompts, num_images=SAMPLES, batch_size=120)
        drawn[when] = to_uint8(samples).reshape(len(prompts), SAMPLES, *samples.shape[1:])
        measure(when, drawn[when].reshape(samples.shape), np.repeat(labels, SAMPLES))
    real = np.stack([to_float(truth[prompt]) for prompt in prompts])
    measure("reconstructed", to_uint8(reconstructions(model, real)), labels)
    shown = range(0, len(prompts), len(prompts) // 12)
    rows = [(drawn["before"][i, 0], drawn["after"][i], truth[prompts[i]]) for i in shown]
    gallery.sheet(rows, ("base", "samples", "Twemoji")).save(style / "style.png")
    return numbers


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    quiet_and_cached()
    base = Path(BASE.value)
    try:
        if sum(flag.value is not None for flag in (CONTROL, SUBJECT, OF_STYLE)) != 1:
            raise ValueError("give one of --control, --subject and --style")
        if CONTROL.value is not None:
            directory, numbers = Path(CONTROL.value), evaluate_control(base, Path(CONTROL.value))
        elif OF_STYLE.value is not None:
            directory, numbers = Path(OF_STYLE.value), evaluate_style(base, Path(OF_STYLE.value))
        else:
            directory = Path(SUBJECT.value)
            numbers = evaluate_subject(base, directory, PROMPT.value, COUNT.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    (directory / "adapters.json").write_text(json.dumps(numbers, indent=2) + "\n")
    for name, value in numbers.items():
        print(f"{name:24s} {value:8.3f}")


if __name__ == "__main__":
    BASE = flags.DEFINE_string("base", "runs/demo/denoiser", "Workdir of the adapted model.")
    CONTROL = flags.DEFINE_string("control", None, "Workdir of a control net.")
    SUBJECT = flags.DEFINE_string("subject", None, "Workdir of a model that learned a subject.")
    OF_STYLE = flags.DEFINE_string("style", None, "Workdir of a model that learned a style.")
    PROMPT = flags.DEFINE_string("prompt", "<it>", "The caption of the subject.")
    COUNT = flags.DEFINE_integer("num_images", 64, "Samples of the subject.")
    app.run(main)
