"""Prepared data sets of TFDS, by the name "tfds:NAME" or "tfds:NAME/CONFIG:VERSION".

It needs no TensorFlow. Only data sets in the ArrayRecord format have random access.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_diffusion.data.sources import Example, Remember, flat
from latent_diffusion.data.transforms import on_white

# Our key → usual names of the feature.
USUAL_FEATURES = {
    "image": ("image",),
    "class_label": ("label", "class_label"),
    "caption": ("caption", "captions", "text"),
}


def records(builder: Any, split: str, name: str, encoded: Sequence[str] = ()) -> Any:
    """The random-access data source of one split; ValueError for an unknown split.

    encoded: features that aren't decoded, such as images, which then are PNG bytes.
    """
    import tensorflow_datasets as tfds

    decoders = {feature: tfds.decode.SkipDecoding() for feature in encoded} or None
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except (ValueError, KeyError, AssertionError):
        splits = ", ".join(sorted(builder.info.splits))
        raise ValueError(f"unknown split {split!r} of {name}; known: {splits}") from None


def _open(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(f"tfds: no data set {name!r} ({reason})") from None
    if not builder.info.splits:
        where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
        raise ValueError(
            f"tfds: {name!r} is not prepared in {builder.data_path}; prepare it once: "
            f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where}, '
            f"file_format='array_record').download_and_prepare()\""
        )
    stored = getattr(builder.info.file_format, "value", None)
    if stored != "array_record":
        raise ValueError(
            f"tfds: {name!r} in {builder.data_path} is stored as {stored}, which has no random "
            "access; prepare it with file_format='array_record'"
        )
    return builder


def feature_map(features: Mapping[str, str], available: Any, name: str) -> dict[str, str]:
    """Return {our key: feature}: `features`, or if it is empty, those with the usual names.

    The picture's usual name counts wherever `features` has no picture and no latents. available:
    the features of the data set `name`. Raises ValueError for a feature that it lacks.
    """
    names = ", ".join(sorted(available))
    for key, feature in features.items():
        if feature not in available:
            raise ValueError(
                f"data.features.{key}: {name!r} has no feature {feature!r}; known: {names}"
            )
    if features.keys() & {"image", "moments", "codes"}:
        return dict(features)
    present = {key: [f for f in usual if f in available] for key, usual in USUAL_FEATURES.items()}
    if not present["image"]:
        raise ValueError(f"data.features: name the image feature of {name!r}; known: {names}")
    found = {key: matches[0] for key, matches in present.items() if matches}
    return {"image": found["image"], **features} if features else found


def _plain(value: Any) -> Any:
    """Convert bytes to str and sequences of bytes to lists of str; other values are unchanged."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "OS"
    ):
        return [_plain(v) for v in value]
    return value


class TFDSSource:
    """One split, with its features under our keys."""

    def __init__(self, builder: Any, split: str, features: Mapping[str, str], name: str):
        self.features = feature_map(features, builder.info.features, name)
        self.records = records(builder, split, name)
        self._builder, self._split, self._name = builder, split, name
        label = self.features.get("class_label")
        names = getattr(builder.info.features[label], "names", None) if label else None
        self.class_names = tuple(names or ())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[int(index)]
        example = {key: _plain(record[feature]) for key, feature in self.features.items()}
        if "image" in example:
            image = example["image"]
            to_rgb = {1: lambda grey: np.repeat(grey, 3, axis=-1), 4: on_white}
            example["image"] = to_rgb.get(image.shape[-1], np.asarray)(image)
        return example

    def captions(self) -> list[str]:
        """All captions, in order; images aren't decoded."""
        if "caption" not in self.features:
            raise ValueError(f"data.features: no caption; mapped: {', '.join(self.features)}")
        images = [feature for key, feature in self.features.items() if key == "image"]
        feature = self.features["caption"]
        rows = records(self._builder, self._split, self._name, encoded=images)
        return flat([_plain(row[feature]) for row in rows])


def make(data_config: Any, split: str) -> Remember:
    """The data set `data_config.name`, "tfds:NAME", in `data_config.dir` (else the TFDS cache)."""
    name = data_config.name.partition(":")[2]
    if not name:
        raise ValueError("data.name='tfds' needs the data set's name: 'tfds:NAME'")
    builder = _open(name, data_config.dir or None)
    return Remember(TFDSSource(builder, split, dict(data_config.features), name))
