"""Draws a sheet for each trained task: conditions, samples and ground truth.

    python -m demo.gallery --workdir=runs/gallery

Every folder in the workdir with a trained denoiser or prior becomes NAME.png beside it, with a row
for each of some test examples: condition | samples | ground truth. A folder with a classifier (see
configs/openmoji_classifier.py) becomes a picture of the unconditional model guided to each class. A
text model also draws image_to_image.png, and the unconditional model image_guiding.png. A denoiser
whose conditions may have any size also draws NAME_larger.png, at twice the size of training. Of a
model of classes, the share of samples is printed that a judge takes for their class.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

from demo import judge
from demo.judged import PER_GROUP, first_caption
from latent_diffusion import data
from latent_diffusion.data import retrieval
from latent_diffusion.data.layout import LayoutTokens, plot
from latent_diffusion.generation.conditions import argument
from latent_diffusion.generation.loading import load, load_classifier
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.runtime.startup import quiet_and_cached

SIDE = 96  # pixels of a picture in the sheet
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.8)  # strengths of image-to-image
TITLES = ("condition", "samples", "ground truth")
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # condition, samples, truth; uint8


def draw_task(directory: Path, rows: int, samples: int, seed: int, scale: int = 1) -> Image.Image:
    """The sheet of a trained denoiser or prior, for evenly spaced examples of its test split.

    A model of classes draws a row for each class and ignores `rows`. scale: the side of the
    pictures ÷ that in training, for models whose condition determines the size.
    """
    config, model = workdir.load_config(directory), load(directory)
    config.data.image_size *= scale
    source = data.make_source(config.data, "test")
    keys = make_conditioner(config.conditioners).keys
    places = _spread(source, rows)
    if keys == ("class_label",):
        labels = [int(source[i]["class_label"]) for i in range(len(source))]
        places, rows = np.unique(labels, return_index=True)[1], len(set(labels))
    examples, batch = _examples(config, source, places)
    conditions = {argument(key): _argument(key, examples, batch) for key in keys}
    drawn = model.sample(
        jax.random.key(seed),
        num_images=samples if keys else samples * rows,
        batch_size=samples * rows,
        **conditions,
    )
    images = to_uint8(drawn).reshape(rows, samples, *drawn.shape[1:])
    truth = [to_uint8(example["image"]) for example in batch]
    shown = [_condition(config, source, e, b, keys) for e, b in zip(examples, batch, strict=True)]
    return sheet([(c, s, t) for c, s, t in zip(shown, images, truth, strict=True)])


def class_accuracies(directory: Path, per_class: int, seed: int) -> tuple[float, float]:
    """How often a judge recognises the class of a model's samples, and of held-out pictures.

    The judge is fitted on the training pictures; both numbers are means over the classes.
    """
    config, model = workdir.load_config(directory), load(directory)
    real = {}
    for split in ("train", "test"):
        source = data.make_source(config.data, split)
        examples = [source[i] for i in range(len(source))]
        images = np.stack([example["image"] for example in examples])
        real[split] = images, np.array([example["class_label"] for example in examples])
    fitted = judge.fit(*real["train"])
    labels = np.repeat(np.unique(real["train"][1]), per_class)
    drawn = model.sample(
        jax.random.key(seed),
        batch_size=per_class,
        class_labels=labels.tolist(),
    )
    return (
        judge.balanced_accuracy(fitted, to_uint8(drawn), labels),
        judge.balanced_accuracy(fitted, *real["test"]),
    )


def draw_classifier(directory: Path, guided: Path, samples: int, seed: int) -> Image.Image:
    """The unconditional model in `guided`, steered to each class by the classifier."""
    model, classifier = load(guided), load_classifier(directory)
    classes = classifier.unet.out_channels
    source = data.make_source(workdir.load_config(directory).data, "train")
    names = getattr(source, "class_names", ()) or [str(i) for i in range(classes)]
    drawn = model.sample(
        jax.random.key(seed),
        num_images=classes * samples,
        classifier=classifier,
        classifier_labels=np.repeat(np.arange(classes), samples).tolist(),
        classifier_scale=3.0,
    )
    images = to_uint8(drawn).reshape(classes, samples, *drawn.shape[1:])
    first = [_of_class(source, label) for label in range(classes)]
    return sheet([(text(names[i]), images[i], first[i]) for i in range(classes)])


def draw_image_guiding(guided: Path, rows: int, samples: int, seed: int) -> Image.Image:
    """The unconditional model in `guided`, steered to a fourfold reduction of test pictures."""
    config, model = workdir.load_config(guided), load(guided)
    source = data.make_source(config.data, "test")
    _, batch = _examples(config, source, _spread(source, rows))
    truth = np.stack([example["image"] for example in batch])
    size = truth.shape[1] // 4
    small = np.asarray(jax.image.resize(truth, (rows, size, size, 3), "cubic"))
    drawn = model.sample(
        jax.random.key(seed),
        num_images=rows * samples,
        target=np.repeat(small, samples, 0),
        target_scale=10.0,
    )
    images = to_uint8(drawn).reshape(rows, samples, *drawn.shape[1:])
    return sheet(list(zip(to_uint8(small), images, to_uint8(truth), strict=True)))


def draw_image_to_image(directory: Path, rows: int, seed: int) -> Image.Image:
    """The text model in `directory` changes test pictures toward the captions of others.

    The higher the strength, the more the result follows the caption and the less the picture.
    """
    config, model = workdir.load_config(directory), load(directory)
    source = data.make_source(config.data, "test")
    examples, batch = _examples(config, source, _spread(source, rows))
    images = np.stack([example["image"] for example in batch])
    prompts = [first_caption(examples[i - 1]) for i in range(rows)]
    drawn = [
        to_uint8(model.sample(jax.random.key(seed), prompts, image=images, strength=strength))
        for strength in STRENGTHS
    ]
    start = to_uint8(images)
    titles = ("prompt", f"strength {', '.join(map(str, STRENGTHS))}", "started from")
    return sheet(
        [(text(prompts[i]), np.stack([d[i] for d in drawn]), start[i]) for i in range(rows)], titles
    )


def _spread(source: Any, rows: int) -> np.ndarray:
    """The indices of `rows` examples, evenly spaced."""
    return np.linspace(0, len(source) - 1, rows).round().astype(int)


def _examples(config: Any, source: Any, places: np.ndarray) -> tuple[list[Any], list[Any]]:
    """Some examples as stored, and as transformed for evaluation."""
    transform = data.make_transform(config.data, train=False)
    examples = [source[int(i)] for i in places]
    return examples, [transform(e, np.random.default_rng(i)) for i, e in enumerate(examples)]


def _of_class(source: Any, label: int) -> np.ndarray:
    return next(
        e["image"] for e in map(source.__getitem__, range(10**9)) if e["class_label"] == label
    )


def _argument(key: str, examples: Sequence[Any], batch: Sequence[Any]) -> Any:
    """The argument of `Model.sample` for a batch key."""
    if key == "tokens":
        return [first_caption(example) for example in examples]
    values = [example[key] for example in batch]
    return [int(v) for v in values] if key == "class_label" else np.stack(values)


def _condition(config: Any, source: Any, example: Any, made: Any, keys: Sequence[str]) -> Any:
    """A picture of the condition of an example."""
    pictures = {
        "tokens": lambda: text(first_caption(example)),
        "class_label": lambda: text(source.class_names[int(example["class_label"])]),
        "layout": lambda: _layout(config, source, made["layout"]),
        "segmentation": lambda: coloured(made["segmentation"]),
        "low_res": lambda: to_uint8(made["low_res"]),
        "mask": lambda: to_uint8(np.where(made["mask"] > 0.5, 0.0, made["image"])),
        "depth": lambda: coloured(made["depth"][..., 0]),
        "neighbours": lambda: _neighbours(config, example["image_embedding"]),
        "image_embedding": lambda: to_uint8(made["image"]),
    }
    shown: list[Callable[[], np.ndarray]] = [pictures[key] for key in keys if key in pictures]
    return shown[0]() if shown else text("no condition")


def _layout(config: Any, source: Any, tokens: np.ndarray) -> np.ndarray:
    objects, _ = LayoutTokens(**config.data.layout).inverse(tokens)
    return plot(objects, SIDE, getattr(source, "class_names", ()))


def _neighbours(config: Any, embedding: np.ndarray) -> np.ndarray:
    """A square of the four pictures whose embeddings are the condition."""
    train = data.make_source(config.data, "train")
    database = retrieval.embeddings_of(train, config.data, "train")
    places, _ = database.search(embedding[None], min(4, config.data.num_neighbours))
    images = [_enlarged(train[int(i)]["image"], SIDE // 2) for i in places[0]]
    images += [np.full_like(images[0], 255)] * (4 - len(images))
    return np.concatenate([np.concatenate(images[:2], 1), np.concatenate(images[2:], 1)], 0)


def coloured(labels: np.ndarray) -> np.ndarray:
    """A label map with a colour for each label, white for 0."""
    colours = np.random.default_rng(7).integers(30, 226, (int(labels.max()) + 2, 3))
    colours[0] = 255
    return colours[labels.astype(int)].astype(np.uint8)


def text(words: str) -> np.ndarray:
    """A white square with words on it."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    font, lines, line = ImageFont.load_default(size=12), [], ""
    for word in words.split():
        if line and font.getlength(f"{line} {word}") > SIDE - 6:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    ImageDraw.Draw(image).multiline_text((3, 3), "\n".join([*lines, line]), "black", font)
    return np.asarray(image)


def sheet(rows: Sequence[Row], titles: Sequence[str] = TITLES) -> Image.Image:
    """condition | samples | truth, enlarged without smoothing, with a title over each."""
    gap, count = 8, len(rows[0][1])
    out = Image.new("RGB", ((count + 2) * SIDE + 2 * gap, len(rows) * (SIDE + 2) + 16), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=11)
    starts = [0, SIDE + gap, (count + 1) * SIDE + 2 * gap]
    for x, title in zip(starts, titles, strict=True):
        pen.text((x + 2, 1), title, "black", font)
    for i, (condition, samples, truth) in enumerate(rows):
        y = 16 + i * (SIDE + 2)
        columns = [starts[0], *(starts[1] + j * SIDE for j in range(count)), starts[2]]
        for x, image in zip(columns, [condition, *samples, truth], strict=True):
            out.paste(Image.fromarray(_enlarged(image, SIDE)), (x, y))
    return out


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST))


def draw(root: Path, rows: int, samples: int, seed: int) -> list[Path]:
    """Draw every trained task in `root`; returns the pictures' paths."""
    folders = sorted(p for p in root.iterdir() if (p / workdir.CONFIG).exists())
    if not folders:
        raise ValueError(f"{root} holds no workdirs; train one, e.g. configs/openmoji_class.py")
    written = []

    def save(name: str, picture: Image.Image) -> None:
        written.append(root / f"{name}.png")
        picture.save(written[-1])
        print(written[-1], flush=True)

    unconditional = root / "unconditional"
    for folder in folders:
        config = workdir.load_config(folder)
        keys = make_conditioner(config.conditioners).keys
        if config.task in ("denoising", "prior"):
            save(folder.name, draw_task(folder, rows, samples, seed))
            if keys == ("class_label",):
                ours, held_out = class_accuracies(folder, PER_GROUP, seed)
                print(
                    f"class recognised: {ours:.0%} of samples, {held_out:.0%} of held-out pictures"
                )
        if config.task == "denoising":
            if {"low_res", "segmentation"} & set(keys):
                save(f"{folder.name}_larger", draw_task(folder, rows, samples, seed, scale=2))
            if config.tokenizer.name != "none":
                save("image_to_image", draw_image_to_image(folder, rows, seed))
        elif config.task == "classifying":
            save(folder.name, draw_classifier(folder, unconditional, samples, seed))
    if unconditional in folders:
        save("image_guiding", draw_image_guiding(unconditional, rows, samples, seed))
    return written


def main(argv: list[str]) -> None:
    """Draw, and print the paths."""
    quiet_and_cached()
    try:
        draw(Path(WORKDIR.value), ROWS.value, SAMPLES.value, SEED.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string(
        "workdir", "runs/gallery", "It has a folder for each trained task."
    )
    ROWS = flags.DEFINE_integer("rows", 8, "Test examples.")
    SAMPLES = flags.DEFINE_integer("samples", 5, "Samples for each of them.")
    SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    app.run(main)
