"""Writes folders of a few pictures with captions, of a style or a subject, for training adapters.

    python -m demo.folders --out=runs/style/pictures --style=twemoji --count=200
    python -m demo.folders --out=runs/subject/pictures --style=twemoji --subject="lion" --word=it

For a style, it writes training pictures of many subjects, evenly spread over the code points, with
their captions. For a subject, it writes one drawing at several positions, sizes and small
rotations, with the caption of `word` and the class, "it face".
"""

import csv
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from latent_diffusion.data.openmoji import catalogue, draw
from latent_diffusion.data.transforms import on_white

SIZE = 32
TURNS = (0, -8, 8, -15, 15)  # degrees
SHARES = (1.0, 0.85, 0.9, 0.8, 0.95)  # sizes of the drawing ÷ the picture's side


def write_style(out: Path, style: str, count: int) -> None:
    """Write `count` training pictures of a style, and metadata.csv."""
    training = [emoji for emoji in catalogue(style) if emoji.split == "train"]
    picked = [training[int(i)] for i in np.linspace(0, len(training) - 1, count).round()]
    pictures = [(draw(emoji.hexcode, SIZE, style), emoji.caption) for emoji in picked]
    write(out, pictures)


def write_subject(out: Path, style: str, subject: str, caption: str) -> None:
    """Write a drawing five times, with different rotations, sizes and positions.

    Raises ValueError for a subject that the style doesn't draw.
    """
    hexcodes = {emoji.caption: emoji.hexcode for emoji in catalogue(style)}
    if subject not in hexcodes:
        raise ValueError(f"--subject={subject!r}: {style} has no drawing of this caption")
    large = draw(hexcodes[subject], 8 * SIZE, style)
    pictures = []
    for i, (degrees, share) in enumerate(zip(TURNS, SHARES, strict=True)):
        side = round(share * SIZE)
        small = large.rotate(degrees, Image.Resampling.BICUBIC).resize((side, side))
        picture = Image.new("RGBA", (SIZE, SIZE))
        rest = SIZE - side
        picture.paste(small, (rest * (i % 2), rest * (i // 2 % 2)))
        pictures.append((picture, caption))
    write(out, pictures)


def write(out: Path, pictures: list[tuple[Image.Image, str]]) -> None:
    """Write pictures on white, and their captions into metadata.csv."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [("file_name", "text")]
    for i, (picture, caption) in enumerate(pictures):
        rows.append((f"{i:03d}.png", caption))
        Image.fromarray(on_white(np.asarray(picture))).save(out / rows[-1][0])
    with open(out / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main(argv: list[str]) -> None:
    """Write the folder."""
    out = Path(OUT.value)
    try:
        if SUBJECT.value:
            write_subject(out, STYLE.value, SUBJECT.value, f"{WORD.value} {CLASS.value}".strip())
        else:
            write_style(out, STYLE.value, COUNT.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(list(out.glob('*.png')))} pictures in {out}")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", None, "The folder.", required=True)
    STYLE = flags.DEFINE_enum("style", "twemoji", ["openmoji", "twemoji"], "The drawings' source.")
    COUNT = flags.DEFINE_integer("count", 200, "Pictures of a style.", lower_bound=1)
    SUBJECT = flags.DEFINE_string("subject", None, "The caption of one drawing.")
    WORD = flags.DEFINE_string("word", "it", "The subject's word in the captions.")
    CLASS = flags.DEFINE_string("class", "face", "The next word, for its class; may be empty.")
    app.run(main)
