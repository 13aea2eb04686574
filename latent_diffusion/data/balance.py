"""Class balancing: an epoch in which pictures of small classes come several times."""

import logging

import numpy as np

from latent_diffusion.data.sources import Around, Example, Source

log = logging.getLogger(__name__)


class Balanced(Around):
    """A source in which a class of N examples has a share proportional to N^(1 − balance).

    balance 0 leaves the classes as they are; 1 makes them equally frequent; 1/2 is square-root
    sampling (Mahajan et al. 2018, §2.2). Examples of the largest class come once. All examples are
    read once, for their `class_label`, unless the source has a method `label_of`; data without
    labels stay as they are, which a warning says. Raises ValueError for a balance outside [0, 1].
    """

    def __init__(self, source: Source, balance: float):
        if not 0 <= balance <= 1:
            raise ValueError(f"data.balance={balance}, expected a number in [0, 1]")
        labels = np.zeros(len(source), np.int64)
        if len(source) and "class_label" in source[0]:
            label_of = getattr(source, "label_of", lambda i: source[i]["class_label"])
            labels = np.array([label_of(i) for i in range(len(source))])
        elif balance:
            log.warning("data.balance=%s changes nothing: the data have no classes", balance)
        self.source = source
        classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        factors = (counts.max() / counts) ** balance
        times = np.zeros(len(labels), np.int64)
        for label in range(len(classes)):
            # Example i of a class comes ⌊factor · (i + 1)⌋ − ⌊factor · i⌋ times.
            ends = np.floor(factors[label] * np.arange(counts[label] + 1) + 1e-9)
            times[inverse == label] = np.diff(ends).astype(np.int64)
        self._index = np.repeat(np.arange(len(labels)), times)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self._index[index])]
