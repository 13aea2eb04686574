"""The frozen parts of a training: LPIPS, the first stage with its scale, conditioners."""

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from latent_diffusion.convert import Bundle, Part, as_params, frozen_parts, read
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.core.rng import seed_key
from latent_diffusion.core.trees import check_same_tree
from latent_diffusion.core.types import Batch, Params
from latent_diffusion.models.first_stage import FirstStage, latent_sums, with_measured_scale
from latent_diffusion.nets.losses.perceptual import load_lpips_params
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.workdir import TEACHER
from latent_diffusion.training import init_from, settings
from latent_diffusion.training.batches import train_batches

log = logging.getLogger(__name__)


def load_constants(
    config: ConfigDict, constants: Any, source: Any, run: Path | None, start: Bundle | None
) -> Any:
    """Replace the random weights in a task's `constants` by the real weights.

    source: the training examples, over which the latent scale is measured. run: the workdir of a
    run that is resumed, which has copies; None for a new run. start: the model of `init_from`.
    """
    if config.task == "autoencoding":
        net, path = config.autoencoding.perceptual, config.autoencoding.perceptual_path
        lpips = None if net == "none" else load_lpips_params(net, path or None)
        return constants if lpips is None else constants.replace(lpips=lpips)
    log.info("first stage: %s", run or config.first_stage.path or "none, the pictures themselves")
    if run is not None:
        first_stage = frozen_parts.load_first_stage(run, constants.first_stage.module)
    else:
        first_stage = _first_stage(config, constants.first_stage, source, start)
    conditioner = load_conditioners(config, constants.conditioner, run)
    return constants.replace(first_stage=first_stage, conditioner=conditioner)


def load_conditioners(
    config: ConfigDict, fresh: Mapping[str, Params], run: Path | None
) -> dict[str, Params]:
    """The pretrained conditioners by name. fresh: gives their shapes. run: see `load_constants`."""
    conditioner: dict[str, Params] = {}
    for name, path in config.pretrained.items() if config.task != "classifying" else ():
        if run is not None:
            path, params = str(run), frozen_parts.load_conditioner(run, name)[0]
        else:
            params = as_params(_read(config, name, path))
        check_same_tree(fresh[name], params, path)
        conditioner[name] = jax.tree.map(jnp.asarray, params)
    return conditioner


def save(config: ConfigDict, constants: Any, folder: Path) -> None:
    """Write the run's copies of the constants; `load_constants` reads them when it is resumed."""
    if config.task == "autoencoding":
        if constants.first_stage is not None:  # of a preview; only training reads it
            frozen_parts.save_first_stage(
                folder, constants.first_stage, config.first_stage.path, TEACHER
            )
        return
    frozen_parts.save_first_stage(folder, constants.first_stage, str(config.first_stage.path))
    for name, params in constants.conditioner.items():
        fields = config.conditioners[name].to_dict()
        frozen_parts.save_conditioner(folder, name, params, fields, config.pretrained[name])
    if getattr(constants, "teacher", None) is not None:
        frozen_parts.save_teacher(folder, constants.teacher, config.distillation.teacher)


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the fields of its pretrained conditioners, from their files.

    Only the headers of files are read. Raises ValueError, in one line, for unusable files.
    """
    for name, path in config.pretrained.items():
        if name not in config.conditioners:
            raise ValueError(
                f"pretrained.{name} is none of the conditioners: {', '.join(config.conditioners)}"
            )
        part = _read(config, name, path)
        fields = flatten_dict({"conditioners": {name: dict(part.fields)}}, sep=".")
        config = settings.decided(config, fields, f"pretrained.{name}={path}")
    return config


def _read(config: ConfigDict, name: str, path: str) -> Part:
    if not path:
        raise ValueError(f"pretrained.{name} is empty: say where its weights lie")
    if not Path(path).exists():
        raise ValueError(f"pretrained.{name}={path} does not exist")
    if config.task == "distillation" and path == config.distillation.teacher:
        return read(path).conditioners[name]  # other tasks don't take parts of all these files
    return read_pretrained(name, path, config.conditioners[name].to_dict())


def _first_stage(
    config: ConfigDict, fresh: FirstStage, source: Any, start: Bundle | None
) -> FirstStage:
    first_stage, scaled = read_first_stage(config, fresh, start)
    if scaled or config.task == "prior":
        return first_stage
    return measure_scale(config, first_stage, source)


def read_first_stage(
    config: ConfigDict, fresh: FirstStage, start: Bundle | None
) -> tuple[FirstStage, bool]:
    """The first stage of a new run, and whether its latent scale is known.

    fresh: gives its shapes. start: the model of `init_from`.
    """
    path = config.first_stage.path
    if config.task == "classifying":  # a denoiser's workdir has the scale, too
        return frozen_parts.load_first_stage(Path(path), fresh.module), True
    loaded = init_from.first_stage_of(config, start)
    if loaded is not None:
        check_same_tree(fresh.params, loaded.params, str(path))
        return loaded, True
    if config.autoencoder.regularization != "identity":
        params = frozen_parts.load_autoencoder_params(Path(path))
        check_same_tree(fresh.params, params, path)
        fresh = fresh.replace(params=params)
    return fresh, False


def encodable(batch: Batch) -> Batch:
    """The entry of a batch that a first stage encodes: cached moments if any, else pictures."""
    key = "moments" if "moments" in batch else "image"
    return {key: batch[key]}


def measure_scale(config: ConfigDict, first_stage: FirstStage, source: Any) -> FirstStage:
    """Set the latent scale from `first_stage.num_batches` training batches, on all devices."""
    mode, mesh = parallel.devices(config.parallel)
    step = parallel.compile_step(latent_sums, mode, mesh=mesh, donate_state=False)
    batches = train_batches(config, source)
    rng = seed_key(config.seed)
    sums = [
        step({}, first_stage, encodable(batch), jax.random.fold_in(rng, i))[1]
        for i, batch in enumerate(itertools.islice(batches, config.first_stage.num_batches))
    ]
    measured = with_measured_scale(first_stage, sums, config.first_stage.normalization)
    log.info(
        "latent scale over %d images: scale_factor %s, shift %s",
        len(sums) * config.batch_size,
        np.round(measured.scale_factor, 5),
        np.round(measured.shift, 5),
    )
    return measured
