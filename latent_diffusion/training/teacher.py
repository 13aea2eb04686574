"""The teacher of a distillation: the model from which its student starts.

`distillation.teacher` names any model that `latent_diffusion.load` reads. The student starts from
its parameters, so `init_from` becomes the same path; both use its conditioners, which are frozen.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from latent_diffusion import convert
from latent_diffusion.convert import frozen_parts
from latent_diffusion.core.trees import check_same_tree
from latent_diffusion.training import settings


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the fields that the teacher decides, except those of `init_from`.

    Raises ValueError, in one line, for a teacher that doesn't fit.
    """
    if config.task != "distillation":
        return config
    path = config.distillation.teacher
    if not path:
        raise ValueError("distillation.teacher is empty: name a trained model")
    for field in ("init_from", "init_from_only", "init_from_changes"):
        if config[field] and config[field] != path:
            raise ValueError(f"{field}={config[field]!r}: a student starts from its teacher alone")
    source, bundle = f"distillation.teacher={path}", convert.read(path)
    if bundle.denoiser is None:
        raise ValueError(f"{source} holds no denoiser")
    if bundle.denoiser[1].fields.get("guidance_dim") is not None:
        raise ValueError(f"{source} takes its guidance as an input: it is distilled already")
    have, want = sorted(bundle.conditioners), sorted(config.conditioners)
    if have != want:
        raise ValueError(
            f"{source} is conditioned by {', '.join(have) or 'nothing'}, but conditioners are "
            f"{', '.join(want) or 'none'}"
        )
    first_stage = config.first_stage.path
    if first_stage and bundle.autoencoder is not None and not _same(first_stage, path):
        raise ValueError(
            f"first_stage.path={first_stage}, but {source} has its own first stage: leave the "
            "field empty"
        )
    fields = {"init_from": path}
    fields |= {f"pretrained.{name}": path for name in have if bundle.conditioners[name].params}
    if config.distillation.method == "consistency" and config.sampling.spacing == "lcm":
        fields["sampling.distilled_steps"] = config.distillation.distilled_steps
    return settings.decided(config, fields, source)


def _same(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def load(config: ConfigDict, constants: Any, run: Path | None, start: Any) -> Any:
    """The constants with the teacher's parameters. run, start: as in `frozen.load_constants`."""
    if config.task != "distillation" or constants.teacher is None:
        return constants
    params = convert.as_params(start.denoiser[1]) if run is None else frozen_parts.load_teacher(run)
    check_same_tree(
        constants.teacher, params, f"distillation.teacher={config.distillation.teacher}"
    )
    return constants.replace(teacher=jax.tree.map(jnp.asarray, params))
