"""Start a training run from parameters that somebody trained: `config.init_from`.

Whatever `latent_diffusion.load` reads serves, whole or in part. The moving average starts from the
loaded parameters, too; the optimiser starts afresh.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from latent_diffusion import convert
from latent_diffusion.convert import kept
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.runtime import workdir

log = logging.getLogger(__name__)

CONV_IN = "unet/input_blocks_0_0/kernel"
# Parts of the objective, not of the model: no file has them, and they start afresh.
_OWN = r"logvar"


def resolve(config: ConfigDict, directory: Path) -> ConfigDict:
    """The config with the first stage of `init_from`, where the run names no other.

    That first stage and its latent scale are kept in the workdir, as `frozen` expects.
    Raises ValueError where the path holds none, or nothing readable.
    """
    if not config.init_from or config.task != "denoising" or config.first_stage.path:
        return config
    if config.autoencoder.regularization == "identity":
        return config
    bundle = convert.read(config.init_from)
    if bundle.autoencoder is None:
        raise ValueError(
            f"init_from={config.init_from} holds no first stage: name one by first_stage.path"
        )
    config = config.copy_and_resolve_references()
    fields = dict(bundle.autoencoder.fields)
    config.autoencoder = ConfigDict({**config.autoencoder.to_dict(), **fields})
    if not (directory / workdir.FIRST_STAGE).exists():
        first_stage = FirstStage(
            convert.as_params(bundle.autoencoder),
            jnp.asarray(bundle.scale_factor, jnp.float32),
            jnp.asarray(bundle.shift, jnp.float32),
            make_autoencoder(config.autoencoder.to_dict()),
        )
        kept.save_first_stage(directory, first_stage, str(config.init_from))
    return config


def base_from(config: ConfigDict, constants: Any) -> Any:
    """The constants with `config.init_from` as what a low-rank adaptation adapts."""
    if config.task != "denoising" or not config.lora.rank:
        return constants
    if not config.init_from:
        raise ValueError("lora.rank adapts a trained model: name it by init_from")
    theirs = parameters_of(convert.read(config.init_from), config.task)
    return constants.replace(base=_filled(constants.base, theirs, "", str(config.init_from)))


def start_from(config: ConfigDict, state: Any) -> Any:
    """The fresh state with the parameters that `config.init_from` holds.

    config.init_from_only: a regular expression over parameter paths; "" is all of them, and then
    each must be in the file. Input channels that the U-Net has beyond the file's start from zero,
    so that at first they change nothing. Raises one ValueError that names what doesn't fit.
    """
    if not config.init_from or (config.task == "denoising" and config.lora.rank):
        return state
    if config.task not in ("autoencoding", "denoising"):
        raise ValueError(f"init_from serves autoencoding and denoising, not {config.task!r}")
    theirs = parameters_of(convert.read(config.init_from), config.task)
    params = _filled(state.params, theirs, config.init_from_only, str(config.init_from))
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = jax.tree.map(jnp.copy, params)
    state = state.replace(params=params, ema_params=ema_params)
    if getattr(state, "codebook", None):
        state = state.replace(codebook=_restarted(state.codebook, params["autoencoder"]))
    return state


def parameters_of(bundle: convert.Bundle, task: str) -> dict[str, Tensor]:
    """A bundle's parameters by their paths in the state of a task; float32, still unread."""
    parts = {"autoencoder": bundle.autoencoder} if task == "autoencoding" else {"unet": bundle.unet}
    if task != "autoencoding":
        parts |= {f"conditioner/{name}": part for name, part in bundle.conditioners.items()}
    return {
        f"{name}/{path}": tensor.astype(np.float32)
        for name, part in parts.items()
        if part is not None
        for path, tensor in part.params.items()
    }


def _filled(params: Any, theirs: Mapping[str, Tensor], only: str, source: str) -> Any:
    """The tree with what `theirs` has of it."""
    ours = flatten_dict(params, sep="/")
    wanted = [path for path in ours if _is_wanted(path, only)]
    if not wanted:
        raise ValueError(
            f"init_from_only={only!r} matches no parameter; they begin with "
            f"{', '.join(sorted({'/'.join(path.split('/')[:2]) for path in ours}))}"
        )
    missing = [path for path in wanted if path not in theirs]
    wrong = [
        f"{path}: ours {ours[path].shape}, there {theirs[path].shape}"
        for path in wanted
        if path in theirs and not _fits(path, ours[path].shape, theirs[path].shape)
    ]
    told = [
        f"{len(names)} {kind}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"
        for kind, names in (("not in it", missing), ("of another shape", wrong))
        if names
    ]
    if told:
        hint = "take a part of it by init_from_only, or change the config"
        raise ValueError(f"init_from={source} does not fit: {'; '.join(told)}; {hint}")
    if left := sorted({path.split("/")[0] for path in theirs.keys() - ours.keys()}):
        log.info("init_from: %s of %s has no place in this model", ", ".join(left), source)
    for path in wanted:
        ours[path] = _with_more_inputs(theirs[path].read(), ours[path].shape)
    log.info("init_from: %d of %d parameters from %s", len(wanted), len(ours), source)
    return unflatten_dict(ours, sep="/")


def _is_wanted(path: str, only: str) -> bool:
    return bool(re.search(only, path)) if only else not re.fullmatch(_OWN, path)


def _fits(path: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    if path == CONV_IN:  # [3 3 in out]
        return ours[:2] == theirs[:2] and ours[3] == theirs[3] and ours[2] >= theirs[2]
    return ours == theirs


def _with_more_inputs(kernel: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """The kernel, with zeros for the input channels that it lacks."""
    lacks = [(0, ours - theirs) for ours, theirs in zip(shape, kernel.shape, strict=True)]
    return jnp.asarray(np.pad(kernel, lacks) if any(b for _, b in lacks) else np.array(kernel))


def _restarted(codebook: Any, params: Any) -> Any:
    """Moving averages of codes, as if every loaded code had been used once."""
    if "embedding" not in codebook:
        return {name: _restarted(part, params[name]) for name, part in codebook.items()}
    codes = params["embedding"]
    return {"uses": jnp.ones(codes.shape[:1]), "total": jnp.copy(codes), "embedding": codes}
