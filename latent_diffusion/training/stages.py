"""Runs that build on an earlier run: a denoiser or a prior on a first stage, a classifier on a
denoiser.
"""

from pathlib import Path

from ml_collections import ConfigDict

from latent_diffusion.convert.experiment import read_config
from latent_diffusion.tasks import DENOISERS
from latent_diffusion.training import settings

# task -> the task whose workdir it builds on
_BUILDS_ON = {
    "denoising": "autoencoding",
    "distillation": "autoencoding",
    "classifying": "denoising",
    "prior": "autoencoding",
}
_OF_USERS = ("image_folder", "tars", "parquet", "tfds")  # data that no package brings along
_NAME_ONE = "name the workdir of one by --config.first_stage.path"
_COMPUTING = ("dtype", "remat")  # how the autoencoder computes, which is up to each run
_OF_TINY = ("encoder_blocks", "decoder_blocks")  # fields that only tiny autoencoders have


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the architecture of the earlier run, and for a classifier also its noise.

    If there is no usable run, raises ValueError with a command that trains one.
    """
    if config.task not in _BUILDS_ON:
        return config
    if config.task in DENOISERS and config.autoencoder.regularization == "identity":
        return config
    if config.task in DENOISERS and config.init_from == config.first_stage.path != "":
        return config  # `init_from` has already set the architecture
    earlier_task, hint = _BUILDS_ON[config.task], _command(config)
    if not config.first_stage.path:
        raise ValueError(f"first_stage.path is empty, but {config.task} needs one; {hint}")
    path = Path(config.first_stage.path)
    try:
        earlier = read_config(path)
    except ValueError as error:
        raise ValueError(f"first_stage.path={path} is not usable: {error}; {hint}") from error
    if earlier.task != earlier_task:
        raise ValueError(
            f"first_stage.path={path} holds a run of {earlier.task!r}, but {config.task} needs one "
            f"of {earlier_task!r}; {_NAME_ONE}"
        )
    sections = ("autoencoder", "diffusion")[: 2 if config.task == "classifying" else 1]
    fields = {
        f"{section}.{name}": value
        for section in sections
        for name, value in earlier[section].items()
        if name in (*config[section], *_OF_TINY) and name not in _COMPUTING
    }
    return settings.decided(config, fields, f"first_stage.path={path}")


def _command(config: ConfigDict) -> str:
    """How to get an earlier run: the command that trains one, if the config names it."""
    trained_by, more = config.first_stage.trained_by, ""
    kind = config.data.name.partition(":")[0]
    if config.task != "classifying" and kind in _OF_USERS:
        if trained_by.startswith("openmoji") and config.task in DENOISERS:
            trained_by = "images_autoencoder.py"  # whose pictures are the user's
        if kind != "image_folder" or trained_by.startswith("openmoji"):
            more = f" --config.data.name={config.data.name}"
        if config.data.dir or kind != "tfds":
            more += f" --config.data.dir={config.data.dir or 'PICTURES'}"
    if not trained_by:
        return _NAME_ONE
    workdir = config.first_stage.path or "runs/first_stage"
    command = f"python train.py --config=configs/{trained_by} --workdir={workdir}{more}"
    if not config.first_stage.path:
        return f"{_NAME_ONE}, or train one with: {command}"
    return f"train one with: {command}"
