"""Read the weights of a pretrained conditioner, from workdirs and from other libraries' files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_diffusion.convert.bundle import Part
from latent_diffusion.convert.components import STEMS
from latent_diffusion.convert.encoders import ENCODERS, read_encoder
from latent_diffusion.convert.orbax import read_orbax
from latent_diffusion.files.reading import read_json, reading
from latent_diffusion.files.tensors import find_weights, open_tensors
from latent_diffusion.nets.autoencoder import WITH_CODEBOOK
from latent_diffusion.runtime import workdir


def read_pretrained(name: str, path: str | Path, chosen: Mapping[str, Any]) -> Part:
    """Read the conditioner `name` from a workdir, another library's folder, or a weight file.

    "code_map" is also read from a first stage with a codebook, in any format of `convert.read`.
    chosen: fields that the user has set; the others are read from files. Parameters are not yet
    read. Raises a ValueError that names a path without such an encoder.
    """
    with reading(f"pretrained.{name}={path}"):
        return _read(name, Path(path), chosen)


def _read(name: str, path: Path, chosen: Mapping[str, Any]) -> Part:
    if name == "code_map":
        return _code_map(path, chosen)
    settings = path / workdir.CONFIG
    if settings.is_file() and "task" in read_json(settings):  # other libraries' have no task
        conditioners = read_orbax(path).conditioners
        if name not in conditioners:
            raise ValueError(
                f"pretrained.{name}={path} has no conditioner of this name; it has "
                f"{', '.join(conditioners) or 'none'}"
            )
        return Part({**conditioners[name].fields, **chosen}, conditioners[name].params)
    if name not in ENCODERS:
        raise ValueError(
            f"pretrained.{name}={path} is no workdir, and other weights exist for "
            f"{', '.join(ENCODERS)} only"
        )
    inner = (path / folder for folder in ENCODERS[name].folders)
    path = next((folder for folder in inner if folder.is_dir()), path)
    config, weights = None, path
    if path.is_dir():
        file, settings = find_weights(path, STEMS), path / "config.json"
        if file is None or not settings.is_file():
            raise ValueError(f"pretrained.{name}={path} has no config.json with weights beside it")
        config, weights = read_json(settings), file
    return read_encoder(name, path, open_tensors(weights).tensors, config, chosen)


def _code_map(path: Path, chosen: Mapping[str, Any]) -> Part:
    """The code map of a prior, or a new one from a first stage for maps."""
    from latent_diffusion.convert import read

    bundle = read(path)
    if (part := bundle.conditioners.get("code_map")) is not None:
        return Part(
            {**part.fields, **chosen, "autoencoder": part.fields["autoencoder"]}, part.params
        )
    stage, others = bundle.autoencoder, (bundle.prior, bundle.denoiser)
    if stage is None or others != (None, None):
        raise ValueError(f"pretrained.code_map={path} is no first stage, and it has no code_map")
    if (kind := stage.fields.get("regularization", "kl")) not in WITH_CODEBOOK:
        raise ValueError(
            f"pretrained.code_map={path} has no codebook: its autoencoder.regularization is "
            f"{kind!r}, and a code map needs vq or gumbel"
        )
    params = {f"autoencoder/{name}": tensor for name, tensor in stage.params.items()}
    return Part({**chosen, "autoencoder": stage.fields}, params)
