"""`load(path)`: a trained model from files of any supported format."""

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion import convert
from latent_diffusion.convert.experiment import read_config
from latent_diffusion.core.types import lookup
from latent_diffusion.files.reading import reading
from latent_diffusion.generation.model import Model
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.denoiser import Denoiser, make_network, schedule_of
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.models.prior import make_prior
from latent_diffusion.nets.conditioners import CONDITIONERS, make_conditioner
from latent_diffusion.nets.eight_bits import COMPUTE, in_eight_bits
from latent_diffusion.runtime import workdir
from latent_diffusion.tasks.classifying import make_classifying

DTYPES = ("float32", "bfloat16", "float16", "int8")


def load(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    lora: Mapping[Any, float] | None = None,
    dtype: Any = None,
    scan: bool | None = None,
) -> Model:
    """The model, or its parts, in a workdir, a diffusers folder or a file of the original code.

    config: the yaml of a single file; None takes a yaml of the same name beside it, if any.
    ema: averaged (True) or live (False) parameters of a single file that has both; None prefers
    the average. variant: "fp16" or "non_ema" files of a folder. tokenizer: a pipeline's folder, a
    tokenizer's, or a vocabulary, in place of the model's own; a single file has none, and None
    looks beside it. lora: files to merge, with their weights. dtype: "bfloat16" or
    "float16", in which the networks compute and have their parameters, except for the first stage,
    which stays in float32; None is float32 for all parameters. "int8": kernels in eight bits, see
    `nets/eight_bits.py`, and all else as with "bfloat16". scan: whether the denoiser's transformers
    are loops over their blocks, which compile faster and copy their parameters; None as saved.
    If there is no model, raises ValueError in one line that begins with the path.
    """
    if dtype is not None:
        dtype = dtype if isinstance(dtype, str) else str(jnp.dtype(dtype))
        lookup(dict.fromkeys(DTYPES), dtype, "dtype")
    bundle = convert.read(path, config=config, ema=ema, variant=variant, tokenizer=tokenizer)
    bundle = convert.with_loras(bundle, (lora or {}).items())
    if scan is not None and bundle.denoiser is not None:
        name, network = bundle.denoiser
        bundle = bundle.with_part(name, replace(network, fields={**network.fields, "scan": scan}))
    with reading(path):
        return as_model(bundle if dtype is None else _computing_in(dtype, bundle), dtype)


def _computing_in(dtype: str, bundle: convert.Bundle) -> convert.Bundle:
    """The bundle with all networks but the first stage computing in a dtype (bfloat16 for int8)."""
    compute = COMPUTE if dtype == "int8" else dtype
    for name, part in bundle.parts():
        module: Any = CONDITIONERS.get(name)
        if name != "autoencoder" and (module is None or hasattr(module, "dtype")):
            bundle = bundle.with_part(name, replace(part, fields={**part.fields, "dtype": compute}))
    return bundle


def load_classifier(path: str | os.PathLike) -> NoisyClassifier:
    """The classifier in a workdir of `classifying`, with its averaged parameters."""
    directory = Path(path).expanduser()
    with reading(path):
        config = read_config(directory)
        if config.task != "classifying":
            raise ValueError(f"{path} holds a run of {config.task!r}, not of a classifier")
        params = jax.tree.map(jnp.asarray, workdir.load_entry(directory, "ema_params")["unet"])
        classifier: NoisyClassifier = make_classifying(config).classifier.replace(params=params)
        return classifier


def as_model(bundle: convert.Bundle, dtype: Any = None) -> Model:
    """Read a bundle's parameters into memory and build its modules.

    dtype: type of all parameters except the first stage's, by default float32.
    """
    first_stage = denoiser = prior = None
    read = functools.partial(convert.as_params, dtype=dtype or np.float32)
    if dtype == "int8":
        if bundle.prior is not None:
            raise ValueError(f"dtype={dtype!r} is for denoisers, not for a prior")
        read = functools.partial(convert.as_params, leaf=in_eight_bits)
    conditioner = {n: read(part) for n, part in bundle.conditioners.items()}
    fields = {name: part.fields for name, part in bundle.conditioners.items()}
    if bundle.autoencoder is not None:
        first_stage = FirstStage(
            convert.as_params(bundle.autoencoder),
            jnp.asarray(bundle.scale_factor, jnp.float32),
            jnp.asarray(bundle.shift, jnp.float32),
            make_autoencoder(bundle.autoencoder.fields),
        )
    if bundle.denoiser is not None:
        name, network = bundle.denoiser
        params = {name: read(network)}
        if conditioner:
            params["conditioner"] = conditioner
        denoiser = Denoiser(
            params,
            schedule_of(bundle.diffusion),
            make_network(name, network.fields),
            make_conditioner(fields),
            bundle.diffusion["prediction"],
            name,
        )
    if bundle.prior is not None:
        if first_stage is None:
            raise ValueError("a prior draws codes of a first stage, which this file lacks")
        prior = make_prior(bundle.prior.fields, fields, first_stage.module).replace(
            params={"transformer": read(bundle.prior), "conditioner": conditioner}
        )
    return Model(
        first_stage=first_stage,
        denoiser=denoiser,
        prior=prior,
        tokenizer=bundle.tokenizer,
        defaults=dict(bundle.sampling),
        image_size=bundle.image_size,
        origin={
            **bundle.notes,
            **({"diffusion": bundle.diffusion} if denoiser else {}),
            "unused": {
                name: {key: np.array(tensor.read()) for key, tensor in part.unused.items()}
                for name, part in bundle.parts()
            },
        },
    )
