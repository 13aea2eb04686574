"""Inception score (Salimans et al., NeurIPS 2016): exp E_x KL(p(y|x) ‖ p(y))."""

import numpy as np

from latent_diffusion.evaluate.measured import Measured, check_count

SPLITS = 10


def inception_score(logits: np.ndarray) -> float:
    """The score of class scores [N K], in float64."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    # Averaging over x first gives the marginal's entropy minus the mean conditional entropy.
    marginal = p.mean(0)
    positive = marginal > 0
    entropy = -np.sum(marginal[positive] * np.log(marginal[positive]))
    return float(np.exp(entropy + np.sum(p * log_p, 1).mean()))


def measure_inception_score(logits: np.ndarray, splits: int = SPLITS, seed: int = 0) -> Measured:
    """Mean over `splits` random parts; error: their standard deviation, as papers report it."""
    check_count("is", len(logits), splits)
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = [inception_score(logits[np.sort(part)]) for part in np.array_split(order, splits)]
    return Measured(float(np.mean(scores)), float(np.std(scores)), len(logits))
