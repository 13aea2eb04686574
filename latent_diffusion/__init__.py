"""Latent diffusion models in JAX: both stages of Rombach et al. 2022.

The public API: `load` a model, then `model.encode`, `decode`, `condition`, `denoise`, `sample`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_diffusion.core.types import Conditioning
    from latent_diffusion.generation.adapters import load_adapter
    from latent_diffusion.generation.loading import load, load_classifier
    from latent_diffusion.generation.model import Model
    from latent_diffusion.process.samplers import SAMPLERS

__all__ = ["SAMPLERS", "Conditioning", "Model", "load", "load_adapter", "load_classifier"]

_MODULES = {
    "SAMPLERS": "process.samplers",
    "Conditioning": "core.types",
    "Model": "generation.model",
    "load": "generation.loading",
    "load_adapter": "generation.adapters",
    "load_classifier": "generation.loading",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that `--help` of a command doesn't wait for JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
