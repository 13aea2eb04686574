"""Files of LoRA and its kinds, as diffusers, PEFT, kohya's sd-scripts and LyCORIS write them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.adapters.adapter import LowRank
from latent_diffusion.convert.adapters.peft_settings import METADATA, PeftSettings
from latent_diffusion.files.reading import read_json
from latent_diffusion.files.tensor import Tensor, TensorFile, is_float
from latent_diffusion.files.tensors import open_tensors
from latent_diffusion.optimisation import deltas

_BIAS = ("lora_bias", "diff_b")
# The ends of tensor names in files → names of factors.
_ENDS = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_B.bias": "lora_bias",
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_mid.weight": "lora_mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    **{name: name for kind in ("LoHa", "LoKr", "full") for name in deltas.KINDS[kind].names},
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_END = re.compile(rf"(.+?)\.({'|'.join(re.escape(e) for e in sorted(_ENDS, key=len)[::-1])})")
# Names as diffusers before versions 0.20 and 0.30 and PEFT spell them → today's names
_TODAY = (
    (r"^base_model\.model\.", ""),
    (r"\.(lora_(?:A|B|magnitude_vector))\.default\b", r".\1"),
    (r"\.processor\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.processor\.to_out_lora\.", r".to_out.0.lora."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.lora\.down\.", ".lora_A."),
    (r"\.lora\.up\.", ".lora_B."),
    (r"^(text_encoder(?:_2)?)\.(?=encoder\.)", r"\1.text_model."),
)
# Names of tensors that show that an adapter is of another kind.
_OTHERS = (
    (r"\.oft_blocks$|\.oft_diag$|\.oft_R\b", "OFT"),
    (r"\.boft_[RSs]\b", "BOFT"),
    (r"\.on_input$|\.ia3_l\b", "IA3"),
    (r"\.vera_lambda_", "VeRA"),
    (r"\.lambda_layer$", "T-LoRA"),
    (r"\.bm\.weight$", "GLoRA with Tucker decomposition"),
    (r"^lora_controlnet$", "Control-LoRA"),
    (r"controlnet_|^control_model\.", "ControlNet"),
    (r"^image_proj", "a part of an IP-Adapter"),
    (r"^adapter\.", "a T2I-Adapter without its config.json"),
    (r"string_to_param|^bundle_emb\.|^emb_params$", "a textual inversion within a LoRA"),
)


def read_low_rank(path: Path, file: TensorFile, settings: PeftSettings) -> LowRank:
    """The LoRA in an opened file, or in PEFT's folder.

    Raises a ValueError that begins with the path and names the kind and the tensor for a file that
    is no LoRA, that lacks one of a pair of factors, or that has an unsupported setting.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        module, factor = _split(path, name)
        if factor in modules.setdefault(module, {}):
            raise ValueError(f"{path}: {name} has its module and factor twice")
        if not (is_float(tensor.dtype) or (factor == "alpha" and tensor.dtype.kind in "iu")):
            raise ValueError(f"{path}: {name} is {tensor.dtype}, not floating-point")
        modules[module][factor] = tensor
    if not modules:
        raise ValueError(f"{path} holds no tensors")
    read = {}
    for module, tensors in modules.items():
        try:
            read[module] = _module(module, tensors, settings)
        except ValueError as error:
            raise ValueError(f"{path}: {module}: {error}") from error
    return LowRank(path=str(path), modules=read)


def open_adapter(path: Path) -> tuple[TensorFile, PeftSettings]:
    """The tensors of a file, or of PEFT's folder, and the settings beside them."""
    config = path / "adapter_config.json" if path.is_dir() else None
    if config is None:
        file = open_tensors(path)
        if any(name.startswith("base_model.model.") for name in file.tensors):
            config = path.with_name("adapter_config.json")
            config = config if config.is_file() else None
    else:
        names = ("adapter_model.safetensors", "adapter_model.bin")
        there = [path / name for name in names if (path / name).is_file()]
        if not there or not config.is_file():
            raise ValueError(
                f"{path} is no adapter: PEFT's folder has {names[0]} and {config.name}"
            )
        file = open_tensors(there[0])
    if config is not None:
        return file, PeftSettings(str(config), read_json(config))
    text = file.metadata.get(METADATA)
    where = f"{path}: {METADATA}"
    return file, PeftSettings(where, {} if text is None else _parsed(where, text))


def _parsed(where: str, text: str) -> Mapping[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error!r:.200})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: not an object of settings, but {str(settings)[:80]!r}")
    return settings


def _split(path: Path, name: str) -> tuple[str, str]:
    """The names of the module and of the factor in a tensor's name."""
    today = name
    for old, new in _TODAY:
        today = re.sub(old, new, today)
    if match := _END.fullmatch(today):
        return match[1], _ENDS[match[2]]
    for pattern, kind in _OTHERS:
        if re.search(pattern, name):
            kinds = ", ".join(deltas.KINDS)
            raise ValueError(f"{path}: {kind} isn't read ({name}); kinds that are: {kinds}, DoRA")
    raise ValueError(f"{path} is no LoRA: {name} is no tensor of one")


def _module(
    name: str, tensors: Mapping[str, Tensor], settings: PeftSettings
) -> dict[str, dict[str, Any]]:
    """The factors of a module's weight and of its bias."""
    arrays = {k: np.asarray(t.astype(np.float32).read()) for k, t in tensors.items()}
    alpha = arrays.pop("alpha", None)
    bias = {k: arrays.pop(k) for k in _BIAS if k in arrays}
    norm = _magnitude(arrays)
    factors: dict[str, dict[str, Any]] = {}
    scale = np.float32(1)
    if arrays:
        kind = deltas.kind_of(arrays)
        if mixed := arrays.keys() - deltas.KINDS[kind].names:
            raise ValueError(f"{kind} with {', '.join(sorted(mixed))} of another kind")
        rank = deltas.rank_of(arrays)
        if alpha is not None and alpha.size != 1:
            raise ValueError(f"alpha has the shape {alpha.shape}")
        if alpha is not None and not np.isfinite(alpha).all():
            raise ValueError(f"alpha is {float(alpha.reshape(()))}")
        if settings.values and alpha is not None:
            raise ValueError(f"it has an alpha, and so have the settings of {settings.where}")
        if settings.of(name).get("use_dora") and not norm:
            raise ValueError(f"{settings.where} says use_dora, and its magnitude is absent")
        if settings.of(name).get("lora_bias") and "lora_bias" not in bias:
            raise ValueError(f"{settings.where} says lora_bias, and its bias is absent")
        if settings.values and kind != "full":
            scale = settings.scale(name, kind, rank)
        elif alpha is not None and rank and kind != "full":
            # LyCORIS and kohya read an alpha of 0 as the rank.
            scale = np.float32(float(alpha.reshape(())) / rank or 1)
        factors["weight"] = {**arrays, **norm, "scale": scale}
    elif norm or alpha is not None:
        raise ValueError(f"{', '.join(norm) or 'alpha'} without factors")
    for factor, array in bias.items():
        if factor == "lora_bias" and "lora_up" not in arrays:
            raise ValueError("LoRA with lora_B.bias lacks lora_up")
        bias_scale = scale if factor == "lora_bias" else np.float32(1)
        factors["bias"] = {"diff": array, "scale": bias_scale}
    if len(bias) > 1:
        raise ValueError("two changes of its bias")
    return factors


def _magnitude(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DoRA's norms. PEFT's are [out]; LyCORIS' are [out 1 …], or [1 in …] for norms of inputs."""
    if "magnitude" in arrays and "dora_scale" in arrays:
        raise ValueError("DoRA with two spellings of its magnitude")
    if "magnitude" in arrays:
        return {"magnitude": arrays.pop("magnitude").reshape(-1)}
    if "dora_scale" not in arrays:
        return {}
    norms = arrays.pop("dora_scale")
    of_inputs = norms.ndim > 1 and norms.shape[0] == 1 and norms.shape[1] > 1
    return {"magnitude_in" if of_inputs else "magnitude": norms.reshape(-1)}


def read_weights(entries: Iterable[str], flag: str = "lora") -> list[tuple[str, float]]:
    """Files and weights from a flag's entries: "FILE:0.8", or "FILE" for the weight 1."""
    weights = []
    for entry in entries:
        file, colon, weight = entry.rpartition(":")
        try:
            weights.append((file, float(weight)) if colon else (entry, 1.0))
        except ValueError as error:
            raise ValueError(f"--{flag}={entry}: write FILE or FILE:WEIGHT") from error
        if weights[-1][0] in [file for file, _ in weights[:-1]]:
            raise ValueError(f"--{flag}={entry}: this file is given twice; add its weights")
    return weights


def read_pictured(entry: str, flag: str) -> tuple[str, str, float]:
    """File, picture and weight in "FILE:PICTURE:WEIGHT", or in "FILE:PICTURE" for the weight 1."""
    file, first, rest = entry.partition(":")
    picture, second, weight = rest.rpartition(":")
    try:
        if not first or not rest:
            raise ValueError
        return (file, picture, float(weight)) if second else (file, rest, 1.0)
    except ValueError as error:
        raise ValueError(f"--{flag}={entry}: write FILE:PICTURE or FILE:PICTURE:WEIGHT") from error
