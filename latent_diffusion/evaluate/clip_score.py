"""CLIP score (Hessel et al., EMNLP 2021): the agreement of pictures with their captions."""

import numpy as np

from latent_diffusion.evaluate.measured import Measured, check_count, mean_of


def measure_clip_score(images: np.ndarray, captions: np.ndarray) -> Measured:
    """Mean of 100 · max(cos, 0) over pairs of embeddings [N D], from any CLIP.

    error: the standard error of the mean. The paper's scores are these times 2.5 / 100.
    """
    check_count("clip", len(images), 2)
    if images.shape != captions.shape:
        raise ValueError(f"image embeddings {images.shape}, caption embeddings {captions.shape}")
    a, b = (np.asarray(e, np.float64) for e in (images, captions))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return mean_of(100 * np.maximum(np.sum(a * b, 1) / np.maximum(norms, 1e-12), 0))
