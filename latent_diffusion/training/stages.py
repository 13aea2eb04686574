"""The earlier run that a run builds on: a denoiser on a first stage, a classifier on a denoiser."""

from pathlib import Path

from ml_collections import ConfigDict

from latent_diffusion.runtime.workdir import load_config

# task -> the task whose workdir it builds on, and a config that trains one
_BUILDS_ON = {
    "denoising": ("autoencoding", "openmoji_autoencoder.py"),
    "classifying": ("denoising", "openmoji_unconditional.py"),
}


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the architecture of the first stage it builds on, if it names one.

    Raises ValueError, with the command that makes one, where that first stage isn't usable.
    """
    config = config.copy_and_resolve_references()
    if config.task not in _BUILDS_ON:
        return config
    if config.task == "denoising" and config.autoencoder.regularization == "identity":
        return config
    if config.task == "denoising" and config.init_from and not config.first_stage.path:
        return config  # it brings its own
    wanted, example = _BUILDS_ON[config.task]
    hint = (
        f"train one with: python train.py --config=configs/{example} "
        f"--workdir={config.first_stage.path or 'runs/first_stage'}, "
        "and name its workdir by --config.first_stage.path"
    )
    if not config.first_stage.path:
        raise ValueError(f"first_stage.path is empty, but {config.task} needs one; {hint}")
    path = Path(config.first_stage.path)
    try:
        theirs = load_config(path)
    except ValueError as error:
        raise ValueError(f"first_stage.path={path} is not usable: {error}; {hint}") from error
    if theirs.task != wanted:
        raise ValueError(f"first_stage.path={path} holds a run of {theirs.task!r}; {hint}")
    config.autoencoder = theirs.autoencoder
    if config.task == "classifying":
        config.diffusion = theirs.diffusion
    return config
