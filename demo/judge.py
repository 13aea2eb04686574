"""Judges of samples: of tones, groups and styles by classifiers, of colours by nearest pictures.

The classifiers are fitted only on real training pictures. Their accuracy on real held-out pictures
is reported, too.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score

BINS = 6  # levels per colour channel


def features(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """Coarse shape (8×8 means) and colours (a histogram) of every picture."""
    num, height, width, _ = images.shape
    blocks = images.reshape(num, 8, height // 8, 8, width // 8, 3).mean((2, 4)) / 255
    levels = images.astype(np.int64) * BINS // 256
    colours = (levels[..., 0] * BINS + levels[..., 1]) * BINS + levels[..., 2]
    counts = [np.bincount(c.ravel(), minlength=BINS**3) for c in colours]
    histogram = np.sqrt(np.stack(counts) / (height * width))
    return np.concatenate([blocks.reshape(num, -1), histogram], axis=1)


def fit(
    images: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, " N"]
) -> RandomForestClassifier:
    """A random forest over `features`, classes weighted equally."""
    forest = RandomForestClassifier(300, class_weight="balanced", random_state=0, n_jobs=-1)
    return forest.fit(features(images), labels)


def balanced_accuracy(
    judge: RandomForestClassifier,
    images: UInt8[np.ndarray, "N H W 3"],
    labels: Int[np.ndarray, " N"],
) -> float:
    """Mean over the classes of the share of pictures that the judge classifies correctly."""
    return float(balanced_accuracy_score(labels, judge.predict(features(images))))


def middle_colours(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N 3"]:
    """The median of each channel over the middle half of both sides, which shapes fill."""
    height, width = images.shape[1:3]
    middle = images[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    return np.median(middle, axis=(1, 2))


def colour_accuracy(
    samples: UInt8[np.ndarray, "N H W 3"],
    captions: Sequence[str],
    real: dict[str, UInt8[np.ndarray, "H W 3"]],
) -> float:
    """Share of samples of the right colour.

    captions: "red heart" or "twemoji red heart", of each sample. real: the real picture of every
    caption. A sample's colour is right if, among the real pictures of its shape and style (the
    caption without its last but one word), the picture of its caption has the nearest colour.
    """
    names = list(real)
    shapes = np.array([" ".join([*name.split()[:-2], name.split()[-1]]) for name in names])
    colours = middle_colours(np.stack([real[name] for name in names]))
    index = np.array([names.index(caption) for caption in captions])
    distances = np.linalg.norm(middle_colours(samples)[:, None] - colours, axis=-1)
    distances[shapes[index][:, None] != shapes] = np.inf
    return float((distances.argmin(1) == index).mean())
