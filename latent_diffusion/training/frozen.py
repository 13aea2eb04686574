"""What training uses and never changes: LPIPS, the first stage, its scale, conditioners."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.convert import Part, as_params, kept
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.models.first_stage import FirstStage, latent_sums, with_measured_scale
from latent_diffusion.nets.losses.perceptual import load_lpips_params
from latent_diffusion.runtime import parallel, workdir
from latent_diffusion.trees import check_same_tree
from latent_diffusion.types import Params, lookup

log = logging.getLogger(__name__)


def load_constants(config: ConfigDict, directory: Path, constants: Any, source: Any) -> Any:
    """Replace the random weights in a task's `constants` by the real ones.

    directory: the run's workdir, which keeps its own copy of everything frozen.
    source: the training examples, over which the latent scale is measured.
    """
    return lookup(_LOADERS, config.task, "task")(config, directory, constants, source)


def _perceptual(config: ConfigDict, directory: Path, constants: Any, source: Any) -> Any:
    net, path = config.autoencoding.perceptual, config.autoencoding.perceptual_path
    return (
        constants
        if net == "none"
        else constants.replace(lpips=load_lpips_params(net, path or None))
    )


def resolve(config: ConfigDict, directory: Path) -> ConfigDict:
    """The config with the fields of its pretrained conditioners, as their files say.

    What the config says of them already stands. Raises ValueError, in one line, where one isn't
    usable. Only the headers of files are read.
    """
    config = config.copy_and_resolve_references()
    for name, path in config.pretrained.items():
        if name not in config.conditioners:
            raise ValueError(
                f"pretrained.{name} is none of the conditioners: {', '.join(config.conditioners)}"
            )
        if kept.conditioner_file(directory, name).exists():
            _, fields = kept.load_conditioner(directory, name)
        else:
            fields = dict(_read(name, path, config.conditioners[name]).fields)
        config.conditioners[name] = ConfigDict({**fields, **config.conditioners[name]})
    return config


def _read(name: str, path: str, given: ConfigDict) -> Part:
    if not path:
        raise ValueError(f"pretrained.{name} is empty: say where its weights lie")
    if not Path(path).exists():
        raise ValueError(f"pretrained.{name}={path} does not exist")
    return read_pretrained(name, path, given.to_dict())


def _denoising(config: ConfigDict, directory: Path, constants: Any, source: Any) -> Any:
    constants = _first_stage(config, directory, constants, source)
    frozen: dict[str, Params] = {}
    for name, path in config.pretrained.items():
        file = kept.conditioner_file(directory, name)
        if file.exists():
            path, params = str(file), kept.load_conditioner(directory, name)[0]
        else:
            part = _read(name, path, config.conditioners[name])
            params = as_params(part)
            kept.save_conditioner(directory, name, params, part.fields, path)
        check_same_tree(constants.conditioner[name], params, path)
        frozen[name] = jax.tree.map(jnp.asarray, params)
    return constants.replace(conditioner=frozen)


def _first_stage(config: ConfigDict, directory: Path, constants: Any, source: Any) -> Any:
    if (directory / workdir.FIRST_STAGE).exists():
        first_stage = kept.load_first_stage(directory, constants.first_stage.module)
        return constants.replace(first_stage=first_stage)
    first_stage = constants.first_stage
    if config.autoencoder.regularization != "identity":
        params = kept.load_autoencoder_params(Path(config.first_stage.path))
        check_same_tree(first_stage.params, params, config.first_stage.path)
        first_stage = first_stage.replace(params=params)
    first_stage = measure_scale(config, first_stage, source)
    kept.save_first_stage(directory, first_stage, str(config.first_stage.path))
    return constants.replace(first_stage=first_stage)


def _as_denoised(config: ConfigDict, directory: Path, constants: Any, source: Any) -> Any:
    """The first stage of a denoiser's workdir, at the scale that the denoiser knows."""
    own = (directory / workdir.FIRST_STAGE).exists()
    origin = directory if own else Path(config.first_stage.path)
    first_stage = kept.load_first_stage(origin, constants.first_stage.module)
    kept.save_first_stage(directory, first_stage, str(origin))
    return constants.replace(first_stage=first_stage)


_LOADERS: dict[str, Callable[..., Any]] = {
    "autoencoding": _perceptual,
    "denoising": _denoising,
    "classifying": _as_denoised,
}


def measure_scale(config: ConfigDict, first_stage: FirstStage, source: Any) -> FirstStage:
    """Set the latent scale from `first_stage.num_batches` training batches, on all devices."""
    mode, mesh = parallel.devices(config.parallel)
    index, count = parallel.process_shard(mode, mesh)
    step = parallel.compile_step(latent_sums, mode, mesh=mesh, donate_state=False)
    batches = data.iterate(
        source,
        data.make_transform(config.data, train=True),
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=index,
        process_count=count,
    )
    rng = jax.random.key(config.seed)
    sums = [
        step({}, first_stage, {"image": batch["image"]}, jax.random.fold_in(rng, i))[1]
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
