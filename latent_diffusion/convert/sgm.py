"""Files of Stable Diffusion XL's original code (sgm): read and write its text encoders and yaml.

The U-Net and the first stage have the names of the earlier code (`compvis`). The yaml has other
settings, which are translated here to those of the earlier code's LatentDiffusion.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert import clip_text, sdxl
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.convert.encoders import read_encoder
from latent_diffusion.convert.settings import Settings, check_class
from latent_diffusion.convert.tables import within
from latent_diffusion.core.types import lookup
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.nets.conditioners.sizes import Sizes

_short = reprlib.repr

EMBEDDERS = "conditioner.embedders."
# Empty tensors that mark finetuned models with v-prediction and with zero terminal SNR.
MARKERS = ("v_pred", "ztsnr")
SIDE = 128  # side of the latents that the released models are trained on
_PREFIXES = {"clip_text": "transformer.text_model.", "clip_text_2": "model."}
_MARKS = {
    "clip_text": "transformer.text_model.embeddings.token_embedding.weight",
    "clip_text_2": "model.token_embedding.weight",
}
_ENGINE = Settings(
    required={"network_config": {}},
    defaults={"scale_factor": 1.0},
    optional={"denoiser_config": {}, "conditioner_config": {}, "first_stage_config": {}},
    harmless=(
        "disable_first_stage_autocast", "use_ema", "ema_decay_rate", "monitor", "scheduler_config",
        "optimizer_config", "loss_fn_config", "sampler_config", "network_wrapper", "ckpt_path",
        "input_key", "log_keys", "no_cond_log", "compile_model", "en_and_decode_n_samples_a_time",
    ),
)  # fmt: skip
_MODULE = Settings(defaults={"target": ""}, optional={"params": {}})
_JOINED = Settings(optional={"emb_models": ({},)})
_EMBEDDER = Settings(
    required={"target": "", "input_key": ""},
    optional={"params": {}},
    harmless=("is_trainable", "ucg_rate", "legacy_ucg_value"),
)
_EMBEDDED = Settings(  # those of an embedder's `params`
    optional={"layer": "", "layer_idx": 11, "outdim": 256, "always_return_pooled": True},
    checked={"max_length": (77,), "legacy": (False,)},
    harmless=("version", "device", "arch", "freeze"),
)
_DENOISER = Settings(
    required={"scaling_config": {}, "discretization_config": {}},
    defaults={"num_idx": 1000},
    checked={"quantize_c_noise": (True,), "do_append_zero": (False,), "flip": (True,)},
    harmless=("weighting_config",),
)
_DDPM = Settings(
    defaults={"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000},
)
_SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}
_KEYS = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")


def is_engine(model: Mapping[str, Any]) -> bool:
    """Whether the `model` of a yaml is for this code."""
    return "network_config" in (model.get("params") or {})


def as_latent_diffusion(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of LatentDiffusion that mean the same; ValueError where there are none."""
    values = _ENGINE.complete(params, "DiffusionEngine")
    check_class(values["denoiser_config"] or {}, ("DiscreteDenoiser",), "denoiser_config")
    denoiser = _params(values["denoiser_config"], "denoiser_config", _DENOISER)
    scaling = _MODULE.complete(denoiser["scaling_config"], "scaling_config")["target"]
    discretization = _MODULE.complete(denoiser["discretization_config"], "discretization_config")
    kind = discretization["target"].rpartition(".")[2]
    if kind != "LegacyDDPMDiscretization":
        raise ValueError(f"discretization_config: {kind!r}; supported: LegacyDDPMDiscretization")
    ends = _DDPM.complete(discretization["params"] or {}, kind)
    return {
        "unet_config": values["network_config"],
        "first_stage_config": values["first_stage_config"],
        "scale_factor": values["scale_factor"],
        "parameterization": lookup(_SCALINGS, scaling.rpartition(".")[2], "scaling_config"),
        "timesteps": ends["num_timesteps"],
        "linear_start": ends["linear_start"],
        "linear_end": ends["linear_end"],
    }


def _params(config: Any, name: str, settings: Settings) -> dict[str, Any]:
    return settings.complete(_MODULE.complete(config or {}, name)["params"] or {}, name)


def with_embedders(
    bundle: Bundle, where: Path, tensors: Mapping[str, Tensor], model: Mapping[str, Any]
) -> Bundle:
    """The bundle with its text encoders and sizes. tensors: by their names without EMBEDDERS.

    model: that of the yaml, or empty. The null condition is zeros in the base model, which has two
    encoders, and the empty prompt in the refiner.
    """
    conditioners, left = dict(bundle.conditioners), set(tensors)
    encoders = {name.split(".")[0] for name in tensors}
    for index in sorted(encoders):
        encoder_tensors = within(tensors, f"{index}.")
        left -= {f"{index}.{name}" for name in encoder_tensors}
        name = next((name for name, mark in _MARKS.items() if mark in encoder_tensors), None)
        if name is None:
            some = ", ".join(list(encoder_tensors)[:3])
            raise ValueError(f"{where}: {EMBEDDERS}{index} is no text encoder: it has {some} …")
        projection = encoder_tensors.get("model.text_projection")
        width = None if projection is None else projection.shape[1]
        chosen = sdxl.text_fields(name, width, len(encoders) == 2)
        conditioners[name] = read_encoder(name, where, encoder_tensors, chosen=chosen)
    joined = (model.get("params") or {}).get("conditioner_config") or {}
    check_class(joined, ("GeneralConditioner",), "conditioner_config")
    said = _params(joined, "conditioner", _JOINED)
    modules = [_EMBEDDER.complete(entry, "emb_models") for entry in said["emb_models"] or ()]
    widths = [(m["params"] or {}).get("outdim") for m in modules if m["target"].endswith("ND")]
    notes = {**bundle.notes, "time_width": next(iter(widths), sdxl.TIME_WIDTH)}
    bundle = sdxl.with_sizes(replace(bundle, conditioners=conditioners, notes=notes), where)
    used, supported = ([_use(m) for m in group] for group in (modules, _models(bundle)))
    if modules and used != supported:
        raise ValueError(f"conditioner_config.emb_models={_short(used)}; supported: {supported}")
    return bundle


def _use(module: Mapping[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """The use of a module of the conditioner: its class, its input, and settings that matter."""
    params = module["params"] or {}
    _EMBEDDED.complete(params, "emb_models")
    settings = {name: params[name] for name in _EMBEDDED.optional if name in params}
    return module["target"].rpartition(".")[2], module["input_key"], settings


# --------------------------------------------------------------------------------------- writing


def write(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the text encoders and the markers, and the yaml's further settings.

    Raises ValueError for conditioners that no model of sgm's code has together, and for an encoder
    that it doesn't have.
    """
    names = bundle.conditioners.keys()
    if not {"clip_text_2", "sizes"} <= names <= {*_PREFIXES, "sizes", "masked_image", "depth"}:
        raise ValueError(
            f"the original has no model conditioned by {' + '.join(sorted(names))}; save it as "
            "orbax"
        )
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(_encoders(bundle)):
        part = bundle.conditioners[name]
        _check_encoder(name, ClipText(**part.fields))
        of = clip_text.transformers_tensors if name == "clip_text" else clip_text.open_clip_tensors
        prefix = f"{EMBEDDERS}{index}.{_PREFIXES[name]}"
        tensors |= {prefix + theirs: tensor for theirs, tensor in of(part).items()}
    diffusion = bundle.diffusion
    chosen = {"v_pred": diffusion["prediction"] == "v", "ztsnr": diffusion["zero_terminal_snr"]}
    if diffusion["prediction"] not in _SCALINGS.values():
        raise ValueError(f"this format has eps and v, not {diffusion['prediction']}")
    if diffusion["schedule"] != "linear":
        raise ValueError(f"this format has the linear schedule, not {diffusion['schedule']!r}")
    unused = {} if bundle.unet is None else bundle.unet.unused
    empty = in_memory(np.zeros(0, np.float32))
    tensors |= {name: unused.get(name, empty) for name, yes in chosen.items() if yes}
    scaling = next(name for name, said in _SCALINGS.items() if said == diffusion["prediction"])
    modules = "sgm.modules.diffusionmodules"
    ends = {"linear_start": diffusion["beta_start"], "linear_end": diffusion["beta_end"]}
    ends["num_timesteps"] = diffusion["num_timesteps"]
    legacy = f"{modules}.discretizer.LegacyDDPMDiscretization"
    denoiser = {
        "num_idx": diffusion["num_timesteps"],
        "scaling_config": {"target": f"{modules}.denoiser_scaling.{scaling}"},
        "discretization_config": {"target": legacy, "params": ends},
    }
    return tensors, {
        "denoiser_config": {
            "target": f"{modules}.denoiser.DiscreteDenoiser",
            "params": denoiser,
        },
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {"emb_models": _models(bundle)},
        },
    }


def _encoders(bundle: Bundle) -> list[str]:
    return [name for name in _PREFIXES if name in bundle.conditioners]


def _check_encoder(name: str, module: ClipText) -> None:
    """Raise ValueError for an encoder that sgm's classes can't express."""
    activation = {"clip_text": "quick_gelu", "clip_text_2": "gelu"}[name]
    shown = (module.num_heads * 64, module.activation, module.skip_last)
    if shown != (module.width, activation, 1):
        raise ValueError(
            f"this format's {name} has heads of 64 channels, {activation} and the states of the "
            f"penultimate layer, this model {module.num_heads} heads in {module.width} channels, "
            f"{module.activation} and {module.skip_last} layers less; save it as diffusers"
        )


def _models(bundle: Bundle) -> list[dict[str, Any]]:
    """The modules of the conditioner, as the yaml lists them."""
    modules, models = "sgm.modules.encoders.modules", []
    for name in _encoders(bundle):
        fields = bundle.conditioners[name].fields
        if name == "clip_text":
            kind, params = "FrozenCLIPEmbedder", {"layer": "hidden", "layer_idx": _seen(fields)}
        else:
            kind = "FrozenOpenCLIPEmbedder2"
            params = {"layer": "penultimate", "always_return_pooled": True, "legacy": False}
        models.append({"input_key": "txt", "target": f"{modules}.{kind}", "params": params})
    sizes = Sizes(**bundle.conditioners["sizes"].fields)
    keys = [*_KEYS[:2], "aesthetic_score" if sizes.aesthetic_score else _KEYS[2]]
    params, target = {"outdim": sizes.width}, f"{modules}.ConcatTimestepEmbedderND"
    models += [{"input_key": key, "target": target, "params": dict(params)} for key in keys]
    return [{"is_trainable": False, **model} for model in models]


def _seen(fields: Mapping[str, Any]) -> int:
    module = ClipText(**fields)
    return module.depth - module.skip_last
