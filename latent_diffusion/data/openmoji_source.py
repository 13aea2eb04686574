"""OpenMoji and Twemoji as sources, from the data sets that their TFDS builders prepare."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from latent_diffusion.data.openmoji import GROUPS
from latent_diffusion.data.sources import Example, Remember, Source, captions
from latent_diffusion.data.transforms import on_white


class OpenMojiSource:
    """A split of the prepared data: `image` on white, `alpha` uint8 [H W], caption, label, name."""

    class_names = GROUPS

    def __init__(self, records: Any):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def captions(self) -> list[str]:
        """All captions, in order."""
        return [record["caption"].decode() for record in self.records]

    def __getitem__(self, index: int) -> Example:
        record = self.records[int(index)]
        rgba = np.asarray(Image.open(io.BytesIO(record["image"])))
        return {
            "image": on_white(rgba),
            "alpha": rgba[..., 3].copy(),
            "caption": record["caption"].decode(),
            "class_label": int(record["class_label"]),
            "name": record["hexcode"].decode(),
        }


class TwoStyles:
    """The pictures of both styles, one style after the other, with captions that name the style.

    The captions of a picture are "twemoji red heart" and "red heart": training takes one of them at
    random, evaluation the first.
    """

    class_names = GROUPS

    def __init__(self, sources: Mapping[str, Source]):
        self.sources = sources

    def __len__(self) -> int:
        return sum(map(len, self.sources.values()))

    def captions(self) -> list[str]:
        """All captions, in order; two for each picture."""
        plain = ((style, text) for style, s in self.sources.items() for text in captions(s))
        return [caption for style, text in plain for caption in _with_style(style, text)]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for style, source in self.sources.items():  # noqa: B007 (used after the loop)
            if index < len(source):
                break
            index -= len(source)
        example = source[index]
        example["caption"] = _with_style(style, example["caption"])
        return {**example, "name": f"{style}-{example['name']}"}


def _with_style(style: str, caption: str) -> list[str]:
    return [f"{style} {caption}", caption]


def make(data_config: Any, split: str) -> Remember:
    """Return the pictures of `data_config.name`: a style, or "openmoji+twemoji" for both."""
    return of_styles(data_config, split, data_config.name.split("+"))


def of_styles(data_config: Any, split: str, styles: Sequence[str]) -> Remember:
    """Return the pictures of one style or of both, which are drawn once into `data_config.dir`.

    Their side is `data_config.shorter_side`, from which crops are cut, if that isn't 0, or else
    `data_config.image_size`.

    split: "train", "test", or an expression of TFDS ("train+test", "train[:100]"). Without a dir
    they lie in the cache of TFDS ($TFDS_DATA_DIR, else ~/tensorflow_datasets).
    """
    from latent_diffusion.data import openmoji_builder
    from latent_diffusion.data.tfds import records

    size = data_config.shorter_side or data_config.image_size
    sources = {}
    for style in styles:
        builder = openmoji_builder.prepare(size, data_config.dir or None, style)
        sources[style] = OpenMojiSource(records(builder, split, style, encoded=["image"]))
    return Remember(TwoStyles(sources) if len(sources) > 1 else sources[style])
