"""Start a training run from trained parameters: `config.init_from`.

It names any model that `latent_diffusion.load` reads, whole or in part. The config fields that
belong to the parameters come with them: `facts` lists the fields. The moving average starts from
the loaded parameters, too; the optimiser's state is new.
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
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.files.reading import read_json, reading
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.models.denoiser import BACKBONES
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.nets.conditioners import CONDITIONERS, tables
from latent_diffusion.nets.tiny_autoencoder import TinyAutoencoder
from latent_diffusion.optimisation import low_rank
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.checkpoint import fingerprints
from latent_diffusion.runtime.workdir import BASE
from latent_diffusion.tasks import DENOISERS
from latent_diffusion.training import settings

log = logging.getLogger(__name__)

CONV_IN = "unet/input_blocks_0_0/kernel"
# Word embedding tables. Rows of words that the file lacks come last.
_WORDS = r"conditioner/(\w+/token_emb|word_map/embedding)/embedding"
# Parameters that may be missing in the file and then are new: those of the objective, and of the
# guidance as an input, which are zero at first.
_FRESH = r"logvar|.*_guidance/kernel"
# Fields of modules that don't affect parameters: the run's values stay.
_OF_THE_RUN = {"attention", "axis_name", "dropout", "dtype", "name", "out_channels", "parent"}
_OF_THE_RUN |= {"pool", "remat", "scan", "codebook_beta", "codebook_legacy", "codebook_ema_decay"}
_OF_THE_RUN |= {"codebook_restart_below", "gumbel_kl_weight", "gumbel_straight_through"}
_NOISE = ("schedule", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr", "prediction")


def read(config: ConfigDict) -> convert.Bundle | None:
    """The model at `config.init_from`, its tensors unread; None if the field is empty."""
    if not config.init_from:
        if config.lora.rank:
            raise ValueError("lora.rank adapts a trained model: name it by init_from")
        if config.textual_inversion.word:
            raise ValueError("textual_inversion.word joins a trained model: name it by init_from")
        if config.control:
            raise ValueError("control steers a trained model: name it by init_from")
        return None
    if config.task not in ("autoencoding", *DENOISERS):
        raise ValueError(f"init_from serves autoencoding and denoising, not {config.task!r}")
    if config.task == "autoencoding" and adapts(config):
        raise ValueError(
            "lora.rank, control and textual_inversion.word are for denoisers, not for "
            "task='autoencoding'"
        )
    return convert.read(config.init_from)


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the fields that belong to the parameters of `init_from`.

    Fields listed in `init_from_changes` don't change. Raises ValueError if it lists other fields.
    """
    bundle = read(config)
    if bundle is None:
        return config
    if config.init_from_only and adapts(config):
        raise ValueError(
            f"init_from_only={config.init_from_only!r}: an adaptation is of the whole model"
        )
    fields = facts(config, bundle, every=True)
    if unknown := set(config.init_from_changes) - fields.keys():
        raise ValueError(
            f"init_from_changes={sorted(unknown)[0]!r} is none of the fields that come with "
            f"init_from={config.init_from}: {', '.join(fields)}"
        )
    return settings.decided(config, facts(config, bundle), f"init_from={config.init_from}")


def facts(config: ConfigDict, bundle: convert.Bundle, every: bool = False) -> dict[str, Any]:
    """The fields that belong to the parameters, by dotted name: networks, noise, words, latents.

    A part of the model contributes its fields if the run takes all of its parameters.
    every: also return the fields in `init_from_changes`.
    """
    fields: dict[str, Any] = {}
    if config.task == "autoencoding":
        if bundle.autoencoder is not None and _comes_whole(config, "autoencoder", bundle):
            fields |= _of_autoencoder(config, bundle.autoencoder)
    elif bundle.denoiser is not None and _comes_whole(config, bundle.denoiser[0], bundle):
        name, network = bundle.denoiser
        fields |= {"backbone": name, **_fields(name, BACKBONES[name], network)}
        if bundle.diffusion is not ASSUMED:
            fields |= {f"diffusion.{name}": bundle.diffusion[name] for name in _NOISE}
        if bundle.autoencoder is not None:
            fields |= _of_autoencoder(config, bundle.autoencoder)
            fields["first_stage.path"] = str(config.init_from)
    if config.task == "distillation":  # whether guidance is an input is the student's choice
        fields.pop(f"{config.backbone}.guidance_dim", None)
    if config.task in DENOISERS:
        for name in config.conditioners:
            path = f"conditioner/{name}"
            if name in bundle.conditioners and _comes_whole(config, path, bundle):
                part, module = bundle.conditioners[name], CONDITIONERS[name]
                fields |= _fields(f"conditioners.{name}", module, part)
                if bundle.tokenizer is not None and "tokens" in module(**part.fields).keys:
                    fields["tokenizer.name"] = bundle.tokenizer.kind
                    fields["tokenizer.max_length"] = bundle.tokenizer.max_length
    changes = () if every else config.init_from_changes
    return {name: value for name, value in fields.items() if name not in changes}


def _comes_whole(config: ConfigDict, path: str, bundle: convert.Bundle) -> bool:
    """Whether the run takes all parameters below `path` that the file has."""
    name = path.removeprefix("conditioner/")
    if name in config.pretrained and config.task != "distillation":
        return False
    paths = [p for p in parameters_of(bundle, config.task) if p.startswith(f"{path}/")]
    return all(re.search(config.init_from_only, p) for p in paths)


def _of_autoencoder(config: ConfigDict, part: convert.Part) -> dict[str, Any]:
    """The fields of a first stage; ValueError if a preview is to start from another kind."""
    wanted, there = config.autoencoder.regularization, part.fields["regularization"]
    if config.task == "autoencoding" and (wanted == "tiny") != (there == "tiny"):
        raise ValueError(
            f"init_from={config.init_from} holds autoencoder.regularization={there!r}, from which "
            f"{wanted!r} can't start"
        )
    module = TinyAutoencoder if there == "tiny" else Autoencoder
    return _fields("autoencoder", module, part)


def _fields(section: str, module: Any, part: convert.Part) -> dict[str, Any]:
    defaults = {name: field.default for name, field in module.__dataclass_fields__.items()}
    values = {name: part.fields.get(name, default) for name, default in defaults.items()}
    return {f"{section}.{k}": v for k, v in values.items() if k not in _OF_THE_RUN}


def first_stage_of(config: ConfigDict, bundle: convert.Bundle | None) -> FirstStage | None:
    """The first stage of `init_from` with its latent scale, if the run uses it; else None."""
    if bundle is None:
        return None
    pixels = config.autoencoder.regularization == "identity"
    if not pixels and config.first_stage.path != str(config.init_from):
        return None
    return FirstStage(
        {} if pixels or bundle.autoencoder is None else convert.as_params(bundle.autoencoder),
        jnp.asarray(bundle.scale_factor, jnp.float32),
        jnp.asarray(bundle.shift, jnp.float32),
        make_autoencoder(config.autoencoder.to_dict()),
    )


def adapts(config: ConfigDict) -> bool:
    """Whether the run trains an addition to the model of `init_from`, which is frozen."""
    return bool(config.lora.rank or config.control or config.textual_inversion.word)


def base_from(config: ConfigDict, constants: Any, bundle: convert.Bundle | None) -> Any:
    """The constants; an adaptation's base becomes the model of `config.init_from`.

    Raises ValueError if the run has other conditions beside the latent than this model: their
    kernel would stay zero.
    """
    if bundle is None or config.task not in DENOISERS or not adapts(config):
        return constants
    tensors = parameters_of(bundle, config.task)
    fresh, there = flatten_dict(constants.base, sep="/").get(CONV_IN), tensors.get(CONV_IN)
    if fresh is not None and there is not None and fresh.shape[2] != there.shape[2]:
        raise ValueError(
            f"init_from={config.init_from} has {there.shape[2]} channels of latent and "
            f"conditions, this run {fresh.shape[2]}: an adaptation has its model's conditions"
        )
    return constants.replace(base=_filled(constants.base, tensors, "", str(config.init_from)))


def check_base(config: ConfigDict, constants: Any, run: Path | None) -> dict[str, str]:
    """Fingerprints of an adaptation's base, by path; empty for other runs.

    run: the workdir of a run that is resumed, which has those of its beginning. Raises ValueError
    if they differ. Earlier versions wrote none: then nothing is compared.
    """
    if not adapts(config) or (run is not None and not (run / BASE).is_file()):
        return {}
    base = fingerprints(constants.base)
    if run is not None:
        with reading(run / BASE):
            before = read_json(run / BASE)
        if changed := sorted(name for name in base if before.get(name) != base[name]):
            raise ValueError(
                f"init_from={config.init_from} isn't the model with which the run in {run} began: "
                f"{len(changed)} of {len(base)} parameters differ, e.g. {changed[0]}; put that "
                "model there again, or start in another workdir"
            )
    return base


def start_from(config: ConfigDict, state: Any, bundle: convert.Bundle | None) -> Any:
    """The fresh state with the parameters of `bundle`, the model at `config.init_from`.

    config.init_from_only: a regular expression over parameter paths; "" takes all parameters, which
    must all be in the file. Input channels that the file lacks have zero weights, so that at first
    they change nothing; words that it lacks start at random. Raises ValueError, with their names,
    if parameters don't fit.
    """
    if bundle is None:
        return state
    if config.task in DENOISERS and config.lora.rank:
        tensors = parameters_of(bundle, config.task)
        names = [n for n in ("params", "ema_params", "target") if getattr(state, n) is not None]
        return state.replace(**{name: _with_norms(getattr(state, name), tensors) for name in names})
    tensors = parameters_of(bundle, config.task)
    if config.task in DENOISERS and config.control:
        params, average = (_with_copies(t, tensors) for t in (state.params, state.ema_params))
        return state.replace(params=params, ema_params=average)
    if config.task in DENOISERS and config.textual_inversion.word:
        rows = _first_vectors(config, state.params["words"], bundle)
        average = {**state.ema_params, "words": jax.tree.map(jnp.copy, rows)}
        return state.replace(params={**state.params, "words": rows}, ema_params=average)
    params = _filled(state.params, tensors, config.init_from_only, str(config.init_from))
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = jax.tree.map(_in_place_of, ema_params, params)
    state = state.replace(params=params, ema_params=ema_params)
    if getattr(state, "target", None) is not None:
        state = state.replace(target=jax.tree.map(_in_place_of, state.target, params))
    if getattr(state, "codebook", None):
        state = state.replace(codebook=_restarted(state.codebook, params["autoencoder"]))
    return state


def _first_vectors(config: ConfigDict, fresh: Any, bundle: convert.Bundle) -> Any:
    """The rows of the word `textual_inversion.start`, repeated to fill those of the new word."""
    start, tokenizer = config.textual_inversion.start, bundle.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"textual_inversion.word needs a tokenizer, and {config.init_from} has none"
        )
    if not start or tokenizer.unknown_words(start):
        raise ValueError(f"textual_inversion.start={start!r} is no word of {config.init_from}")
    pieces = [i for i in tokenizer([start])[0] if i not in (*tokenizer.empty, tokenizer.pad_id)]
    count = config.textual_inversion.num_vectors
    ids = [int(pieces[k % len(pieces)]) for k in range(count)]
    words = {}
    for name, table in tables(fresh).items():
        rows = np.asarray(bundle.conditioners[name].params[table].read(), np.float32)[ids]
        words[name] = _in_place_of(fresh[name], rows)
    return words


def _with_copies(params: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A fresh control net with copies of the U-Net's parameters."""
    control = flatten_dict(params["control"], sep="/")
    for path, fresh in control.items():
        if (tensor := tensors.get(f"unet/{path}")) is not None:
            control[path] = _in_place_of(fresh, tensor.read())
    return {**params, "control": unflatten_dict(control, sep="/")}


def _with_norms(params: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Fresh factors; their magnitudes, if any, become the norms of the adapted kernels."""
    factors = flatten_dict(params["lora"], sep="/")
    for path, fresh in factors.items():
        kernel, _, name = path.rpartition("/")
        if name == "magnitude":
            factors[path] = _in_place_of(fresh, low_rank.magnitude(tensors[kernel].read()))
    return {**params, "lora": unflatten_dict(factors, sep="/")}


def parameters_of(bundle: convert.Bundle, task: str) -> dict[str, Tensor]:
    """A bundle's parameters by their paths in the state of a task: float32, still unread."""
    parts: dict[str, convert.Part | None] = {"autoencoder": bundle.autoencoder}
    if task != "autoencoding":
        parts = dict([bundle.denoiser] if bundle.denoiser else [])
        parts |= {f"conditioner/{name}": part for name, part in bundle.conditioners.items()}
    return {
        f"{name}/{path}": tensor.astype(np.float32)
        for name, part in parts.items()
        if part is not None
        for path, tensor in part.params.items()
    }


def _filled(params: Any, tensors: Mapping[str, Tensor], only: str, source: str) -> Any:
    """The tree with the parameters of `tensors` whose paths match `only`."""
    flat = flatten_dict(params, sep="/")
    wanted = [path for path in flat if _is_wanted(path, only, path in tensors)]
    if not wanted:
        raise ValueError(
            f"init_from_only={only!r} matches no parameter; they begin with "
            f"{', '.join(sorted({'/'.join(path.split('/')[:2]) for path in flat}))}"
        )
    missing = [path for path in wanted if path not in tensors]
    wrong = [
        f"{path}: ours {flat[path].shape}, there {tensors[path].shape}"
        for path in wanted
        if path in tensors and not _fits(path, flat[path].shape, tensors[path].shape)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"
        for kind, names in (("not in it", missing), ("of another shape", wrong))
        if names
    ]
    if problems:
        hint = "take a part of it by init_from_only, or change the config"
        raise ValueError(f"init_from={source} does not fit: {'; '.join(problems)}; {hint}")
    if left := sorted({path.split("/")[0] for path in tensors.keys() - flat.keys()}):
        log.info("init_from: %s of %s has no place in this model", ", ".join(left), source)
    for path in wanted:
        array = _enlarged(path, tensors[path].read(), flat[path])
        flat[path] = _in_place_of(flat[path], array)
    log.info("init_from: %d of %d parameters from %s", len(wanted), len(flat), source)
    filled = unflatten_dict(flat, sep="/")
    return {name: filled.get(name, {}) for name in params}  # also parts without parameters


def _is_wanted(path: str, only: str, there: bool) -> bool:
    return bool(re.search(only, path)) if only else there or not re.fullmatch(_FRESH, path)


def _fits(path: str, shape: tuple[int, ...], in_file: tuple[int, ...]) -> bool:
    if path == CONV_IN:  # [3 3 in out]
        return shape[:2] == in_file[:2] and shape[3] == in_file[3] and shape[2] >= in_file[2]
    if re.fullmatch(_WORDS, path):
        return shape[1:] == in_file[1:] and shape[0] >= in_file[0]
    return shape == in_file


def _in_place_of(fresh: Any, array: Any) -> Any:
    """A copy of `array` with the sharding of the fresh array, which is freed to save memory."""
    if isinstance(fresh, jax.Array):
        copy = parallel.put(array, fresh.sharding).copy()
        fresh.delete()
        return copy
    return jnp.asarray(array)  # in a resumed run, `fresh` is only a shape


def _enlarged(path: str, array: np.ndarray, fresh: Any) -> Any:
    """The file's array, enlarged by zeros for missing input channels, or fresh rows for words."""
    if fresh.shape == array.shape:
        return array
    base = jnp.zeros(fresh.shape, fresh.dtype) if path == CONV_IN else fresh
    return base.at[tuple(slice(n) for n in array.shape)].set(array)


def _restarted(codebook: Any, params: Any) -> Any:
    """New moving averages of codes, as if every loaded code had been used once."""
    if "embedding" not in codebook:
        return {name: _restarted(part, params[name]) for name, part in codebook.items()}
    codes = params["embedding"]
    return {"uses": jnp.ones(codes.shape[:1]), "total": jnp.copy(codes), "embedding": codes}
