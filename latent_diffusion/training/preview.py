"""The first stage of a preview: a tiny autoencoder learns the latents of a frozen first stage.

With `autoencoder.regularization="tiny"`, `first_stage.path` names any model that
`latent_diffusion.load` reads and whose scaled latents a denoiser makes. The run has a copy of it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import convert
from latent_diffusion.convert import frozen_parts
from latent_diffusion.core.trees import check_same_tree
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.runtime.workdir import TEACHER
from latent_diffusion.training import settings


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the fields of a preview's first stage, in `first_stage.autoencoder`.

    Raises ValueError, in one line, for a first stage that doesn't fit.
    """
    if config.task != "autoencoding":
        return config
    path = config.first_stage.path
    if config.autoencoder.regularization != "tiny":
        return config  # the run needs no other first stage
    if not path:
        raise ValueError(
            "a tiny autoencoder learns the latents of a trained model: name it by first_stage.path"
        )
    bundle = convert.read(path)
    part = bundle.autoencoder
    if part is None or part.fields["regularization"] in ("identity", "tiny"):
        raise ValueError(f"first_stage.path={path} holds no first stage that a preview could learn")
    if bundle.denoiser is None and np.all(bundle.scale_factor == 1) and np.all(bundle.shift == 0):
        raise ValueError(
            f"first_stage.path={path} doesn't know the scale of its latents: name the workdir of a "
            "denoiser"
        )
    tiny, frozen = make_autoencoder(config.autoencoder), make_autoencoder(part.fields)
    for name in ("downsampling", "latent_channels", "image_channels"):
        have, want = getattr(tiny, name), getattr(frozen, name)
        if have != want:
            raise ValueError(f"first_stage.path={path} has {name} {want}, the preview has {have}")
    fields = {f"first_stage.autoencoder.{name}": value for name, value in part.fields.items()}
    return settings.decided(config, fields, f"first_stage.path={path}")


def load(config: ConfigDict, constants: Any, run: Path | None) -> Any:
    """The constants with the parameters of a preview's first stage.

    run: the workdir of a run that is resumed, which has a copy; None for a new run.
    """
    if config.task != "autoencoding" or constants.first_stage is None:
        return constants
    fresh = constants.first_stage
    if run is None:
        bundle = convert.read(config.first_stage.path)
        assert bundle.autoencoder is not None  # `resolve` has checked it
        scale, shift = (jnp.asarray(x, jnp.float32) for x in (bundle.scale_factor, bundle.shift))
        first_stage = FirstStage(convert.as_params(bundle.autoencoder), scale, shift, fresh.module)
    else:
        first_stage = frozen_parts.load_first_stage(run, fresh.module, TEACHER)
    check_same_tree(fresh.params, first_stage.params, f"first_stage.path={config.first_stage.path}")
    return constants.replace(first_stage=jax.tree.map(jnp.asarray, first_stage))
