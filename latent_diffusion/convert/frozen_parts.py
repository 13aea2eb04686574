"""Copies of a run's frozen parts in its workdir: first stage with scale, conditioners, teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from latent_diffusion.core.types import Params
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.runtime.checkpoint import load_tree, save_tree
from latent_diffusion.runtime.workdir import FIRST_STAGE, TEACHER, load_config, load_entry


def load_autoencoder_params(workdir: Path, config: ConfigDict | None = None) -> Params:
    """The parameters of a trained autoencoder in its workdir: averaged, or else the last ones."""
    config = load_config(workdir) if config is None else config
    return load_entry(workdir, "ema_params" if config.ema_decay else "params")["autoencoder"]


def save_first_stage(
    workdir: Path, first_stage: FirstStage, source: str, file: str = FIRST_STAGE
) -> None:
    """Store a copy of the frozen first stage and its scale. source: where it came from."""
    tree = {
        "params": first_stage.params,
        "scale_factor": first_stage.scale_factor,
        "shift": first_stage.shift,
    }
    save_tree(workdir / file, tree, {"source": source})


def load_first_stage(workdir: Path, module: nn.Module, file: str = FIRST_STAGE) -> FirstStage:
    """The first stage that `save_first_stage` stored."""
    tree, _ = load_tree(workdir / file)
    return FirstStage(
        params=tree.get("params", {}),
        scale_factor=jnp.asarray(tree["scale_factor"]),
        shift=jnp.asarray(tree["shift"]),
        module=module,
    )


def save_teacher(workdir: Path, params: Params, source: str) -> None:
    """Store a copy of a distillation's teacher, for resuming the run. source: its path."""
    save_tree(workdir / TEACHER, params, {"source": source})


def load_teacher(workdir: Path) -> Params:
    """The parameters that `save_teacher` stored."""
    return load_tree(workdir / TEACHER)[0]


def conditioner_file(workdir: Path, name: str) -> Path:
    """The file in which the pretrained conditioner `name` is stored."""
    return workdir / f"conditioner_{name}.safetensors"


def save_conditioner(
    workdir: Path, name: str, params: Params, fields: Mapping[str, Any], source: str
) -> None:
    """Store a copy of a pretrained conditioner. source: where it came from."""
    metadata = {"source": source, "fields": dict(fields)}
    save_tree(conditioner_file(workdir, name), params, metadata)


def load_conditioner(workdir: Path, name: str) -> tuple[Params, dict[str, Any]]:
    """Parameters and fields of a conditioner that `save_conditioner` stored."""
    tree, metadata = load_tree(conditioner_file(workdir, name))
    return tree, metadata["fields"]
