"""A judge of samples: simple classifiers that are fitted on real training pictures only.

Its accuracy on real held-out pictures is reported beside its verdict on samples.
"""

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
    """Mean over the classes of the share of pictures that the judge classifies rightly."""
    return float(balanced_accuracy_score(labels, judge.predict(features(images))))
