"""Our format: a workdir like that of a run, but without a state from which training can resume."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from latent_diffusion.convert import frozen_parts
from latent_diffusion.convert.bundle import Bundle, Part, as_params, as_part
from latent_diffusion.convert.experiment import read_config
from latent_diffusion.core.types import Params
from latent_diffusion.data.tokenizers import Tokenizer, load_tokenizer
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder, own_fields
from latent_diffusion.nets.conditioners import tables, with_rows
from latent_diffusion.optimisation import low_rank
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks.distillation import guidance_range


def read_orbax(directory: Path) -> Bundle:
    """Read a workdir: its averaged parameters, and its first stage.

    Raises ValueError for a damaged config and CheckpointError where no checkpoint is usable.
    """
    config = read_config(directory)
    if config.get("control"):
        raise ValueError(
            f"{directory} is a control net of {config.init_from}, no model: give it to load_adapter"
        )
    if config.task == "classifying":
        raise ValueError(f"{directory} is a classifier, no model: give it to load_classifier")
    fields = own_fields(config.autoencoder.to_dict()) if "autoencoder" in config else {}
    notes = config.origin.to_dict() if "origin" in config else {}
    if config.task == "distillation":
        notes["guidance_range"] = guidance_range(config)
    size = config.data.image_size
    bundle = Bundle(image_size=size if isinstance(size, int) else tuple(size), notes=notes)
    if config.task == "autoencoding" and not (directory / workdir.FIRST_STAGE).exists():
        entry = "ema_params" if config.ema_decay else "params"
        params = workdir.open_entry(directory, entry)["autoencoder"]
        return replace(bundle, autoencoder=as_part(fields, params))
    if fields:
        first_stage = frozen_parts.load_first_stage(directory, make_autoencoder(fields))
        part = as_part(fields, first_stage.params)
        scale = {"scale_factor": first_stage.scale_factor, "shift": first_stage.shift}
        bundle = replace(bundle, autoencoder=part, **scale)
    if config.task == "autoencoding":
        return bundle
    return _with_network(bundle, directory, config)


def _with_network(bundle: Bundle, directory: Path, config: ConfigDict) -> Bundle:
    """Read the denoiser or the prior, its conditioners and its tokenizer."""
    params = workdir.open_entry(directory, "ema_params")
    if config.get("lora", {}).get("rank"):
        return _adapted(bundle, directory, config, params["lora"])
    if config.get("textual_inversion", {}).get("word"):
        return _with_words(bundle, directory, config, params["words"])
    tokenizer = None
    if config.tokenizer.name != "none":
        tokenizer = load_tokenizer(directory / workdir.TOKENIZER)
    trees = dict(params.get("conditioner", {}))
    trees |= {
        n: frozen_parts.load_conditioner(directory, n)[0] for n in config.get("pretrained", {})
    }
    conditioners = {
        name: as_part(fields, trees.get(name, {}))
        for name, fields in conditioner_fields(config).items()
    }
    bundle = replace(bundle, conditioners=conditioners, tokenizer=tokenizer)
    if config.task == "prior":
        part = as_part(config.transformer.to_dict(), params["transformer"])
        return replace(bundle, prior=part, sampling=config.prior.sampling.to_dict())
    name = config.get("backbone", "unet")
    fields = config[name].to_dict()
    part = as_part(fields, params[name])
    fields["out_channels"] = _out_channels(name, part)
    return replace(
        bundle, diffusion=config.diffusion.to_dict(), sampling=config.sampling.to_dict()
    ).with_part(name, part)


def conditioner_fields(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The fields of a run's conditioners, with the form of the sentences that it reads."""
    conditioners: dict[str, dict[str, Any]] = config.conditioners.to_dict()
    form = config.data.get("layout", {})
    for name in ("layout", "layout_tokens"):
        if name in conditioners and form.get("centres"):
            conditioners[name] |= {"centres": True, "encode_crop": form["encode_crop"]}
    return conditioners


def _out_channels(name: str, network: Part) -> int:
    """The channels of a network's prediction, which the width of its last layer shows."""
    fields, last = network.fields, "out_2/kernel"
    if name in ("dit", "mmdit"):
        parts = fields["patch_size"] ** 2 * (2 if fields.get("learned_variance") else 1)
        return network.params["final_layer_linear/kernel"].shape[-1] // parts
    if fields.get("num_codes") is not None:
        last = "id_predictor_1/kernel"
    return network.params[last].shape[-1]


def _base(directory: Path, config: ConfigDict) -> Bundle:
    """Read the model of `init_from` with the run's conditioners.

    The workdir has those that were pretrained elsewhere; others may have no parameters.
    """
    from latent_diffusion.convert import read

    base = read(config.init_from)
    conditioners: dict[str, Part] = {}
    for name, fields in conditioner_fields(config).items():
        part = base.conditioners.get(name, Part(fields, {}))
        if config.get("pretrained", {}).get(name, config.init_from) != config.init_from:
            part = as_part(fields, frozen_parts.load_conditioner(directory, name)[0])
        conditioners[name] = part
    return replace(base, conditioners=conditioners)


def _adapted(bundle: Bundle, directory: Path, config: ConfigDict, factors: Params) -> Bundle:
    """Read the model that the run adapted from `init_from`, and add the run's factors to it."""
    base = _base(directory, config)
    adapted: dict[str, dict[str, Any]] = {}
    for path, of_kernel in low_rank.flatten_factors(factors).items():
        part, _, kernel = path.removeprefix("conditioner/").partition("/")
        alpha = np.float32(config.lora.alpha)
        arrays = {name: np.asarray(factor) for name, factor in of_kernel.items()}
        adapted.setdefault(part, {})[kernel] = {**arrays, "alpha": alpha}
    parts = dict(base.parts())
    for name, kernels in adapted.items():
        params, merged = parts[name].params, {}
        for path, of_kernel in kernels.items():
            change = partial(low_rank.adapted, factors=of_kernel, alpha=of_kernel["alpha"])
            merged[path] = params[path].changed(change, f"{name}/{path}")
        base = base.with_params(name, merged)
    tokenizer = base.tokenizer
    if (directory / workdir.TOKENIZER).exists():
        tokenizer = load_tokenizer(directory / workdir.TOKENIZER)
    return replace(_of_run(base, bundle, config, tokenizer), lora=adapted)


def _with_words(bundle: Bundle, directory: Path, config: ConfigDict, words: Params) -> Bundle:
    """Read the model of `init_from`, and add the run's word to its tables and its tokenizer."""
    base, words = _base(directory, config), {n: np.asarray(x) for n, x in words.items()}
    more = with_rows(
        {n: p.fields for n, p in base.conditioners.items()}, len(next(iter(words.values())))
    )
    for name, table in tables(base.conditioners).items():
        part = base.conditioners[name]
        whole = np.concatenate([np.asarray(part.params[table].read()), words[name]])
        params = {**part.params, table: in_memory(whole)}
        base = base.with_part(name, replace(part, fields=more[name], params=params))
    return _of_run(base, bundle, config, load_tokenizer(directory / workdir.TOKENIZER))


def _of_run(base: Bundle, run: Bundle, config: ConfigDict, tokenizer: Tokenizer | None) -> Bundle:
    """The adapted model, with the first stage, the noise, the sampling and the size of its run.

    A distilled model doesn't get the scheduler of its teacher.
    """
    notes = dict(base.notes)
    if config.task == "distillation":
        notes.pop("scheduler", None)
    return replace(
        base,
        notes={**notes, **run.notes},
        autoencoder=run.autoencoder,
        scale_factor=run.scale_factor,
        shift=run.shift,
        diffusion=config.diffusion.to_dict(),
        sampling=config.sampling.to_dict(),
        image_size=run.image_size,
        tokenizer=tokenizer,
    )


def write_orbax(bundle: Bundle, path: Path, progress: Any = lambda count: None) -> None:
    """Write a workdir that `load` and `--config.first_stage.path` read.

    progress: is called with numbers of parameters that are written. Raises ValueError for a model
    without a first stage, a denoiser and a prior.
    """
    if bundle.denoiser is None and bundle.prior is None and bundle.autoencoder is None:
        raise ValueError("a workdir holds a first stage or a denoiser; this model has neither")
    config: dict[str, Any] = {
        "task": _task(bundle),
        "ema_decay": 0.0,
        "data": {"image_size": bundle.image_size},
        "tokenizer": {"name": "none" if bundle.tokenizer is None else bundle.tokenizer.kind},
        "conditioners": {name: _plain(part.fields) for name, part in bundle.conditioners.items()},
        "diffusion": dict(bundle.diffusion),
        "sampling": dict(bundle.sampling),
        "origin": dict(bundle.notes),
    }
    if bundle.autoencoder is not None:
        config["autoencoder"] = _plain(bundle.autoencoder.fields)
        _write_first_stage(bundle, path, progress)
    if bundle.prior is not None:
        config["transformer"] = _plain(bundle.prior.fields)
        config["transformer"].pop("num_codes", None)  # a run takes it from its first stage
        config["prior"] = {"sampling": config.pop("sampling")}
    if bundle.denoiser is not None:
        name, network = bundle.denoiser
        config["backbone"], config[name] = name, _plain(network.fields)
        config[name].pop("out_channels", None)  # a run takes it from its first stage
    workdir.save_config(ConfigDict(config), path)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(path / workdir.TOKENIZER)
    with Checkpointer(path / "checkpoints", lazy=True) as checkpoints:
        checkpoints.save(0, _state(bundle, progress))


def _task(bundle: Bundle) -> str:
    if bundle.prior is not None:
        return "prior"
    return "autoencoding" if bundle.denoiser is None else "denoising"


def _write_first_stage(bundle: Bundle, path: Path, progress: Any) -> None:
    assert bundle.autoencoder is not None
    first_stage = FirstStage(
        as_params(bundle.autoencoder),
        jnp.asarray(bundle.scale_factor, jnp.float32),
        jnp.asarray(bundle.shift, jnp.float32),
        make_autoencoder(bundle.autoencoder.fields),
    )
    frozen_parts.save_first_stage(path, first_stage, "converted")
    if _task(bundle) != "autoencoding":
        progress(sum(tensor.size for tensor in bundle.autoencoder.params.values()))


def _state(bundle: Bundle, progress: Any) -> dict[str, Any]:
    """The checkpoint's tree, whose arrays are read from the source file when they are needed."""

    def lazy(part: Part) -> Any:
        return unflatten_dict({k: _lazy(t, progress) for k, t in part.params.items()}, sep="/")

    if _task(bundle) == "autoencoding":
        assert bundle.autoencoder is not None
        return {"params": {"autoencoder": lazy(bundle.autoencoder)}}
    conditioner = {name: lazy(part) for name, part in bundle.conditioners.items()}
    networks = {"transformer": bundle.prior} | dict([bundle.denoiser] if bundle.denoiser else [])
    parts = {name: lazy(part) for name, part in networks.items() if part is not None}
    return {"ema_params": {**parts, "conditioner": conditioner}}


def _lazy(tensor: Tensor, progress: Any) -> Tensor:
    """The tensor, with progress reports: it is read once for its fingerprint, once for writing."""
    tensor = tensor.astype(np.float32)

    def read() -> np.ndarray:
        progress(tensor.size / 2)
        return tensor.read()

    return Tensor(tensor.shape, tensor.dtype, read)


def _plain(fields: Any) -> dict[str, Any]:
    """The fields in a form that JSON can hold: a dtype is its name."""
    named: dict[str, Any] = {
        k: dict(v) if isinstance(v, Mapping) else v
        for k, v in fields.items()
        if k not in ("parent", "name", "axis_name")
    }
    if named.get("dtype") is not None:
        named["dtype"] = str(jnp.dtype(named["dtype"]))
    return named
