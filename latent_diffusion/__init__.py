"""Latent diffusion models in JAX: both stages of Rombach et al. 2022.

The public API: `load` a model, then `model.encode`, `decode`, `condition`, `denoise`, `sample`.
"""

from latent_diffusion.generation.loading import load, load_classifier
from latent_diffusion.generation.model import Model
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.types import Conditioning

__all__ = ["SAMPLERS", "Conditioning", "Model", "load", "load_classifier"]
