"""OpenMoji as a source of examples, from the data set that its TFDS builder prepares."""

import io
from typing import Any

import numpy as np
from PIL import Image

from latent_diffusion.data.openmoji import GROUPS
from latent_diffusion.data.sources import Example, Remember
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


def make(data_config: Any, split: str) -> Remember:
    """Return the data, which is drawn once into `data_config.dir`.

    Its pictures have the size `data_config.shorter_side`, from which crops are cut, if it is given,
    else `data_config.image_size`.

    split: "train", "test", or an expression of TFDS ("train+test", "train[:100]"). Without a dir
    it lies in the cache of TFDS ($TFDS_DATA_DIR, else ~/tensorflow_datasets).
    """
    from latent_diffusion.data import openmoji_builder
    from latent_diffusion.data.tfds import records

    size = data_config.shorter_side or data_config.image_size
    builder = openmoji_builder.prepare(size, data_config.dir or None)
    return Remember(OpenMojiSource(records(builder, split, "openmoji", encoded=["image"])))
