"""The LoRA of a workdir: as an adapter, and in files with the names of diffusers or kohya.

CLIP's q, k and v are one kernel here and separate in files: each gets a copy of the factor A.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.adapters.names import has_two, kohya_prefix, own_pairs, pairs_of
from latent_diffusion.convert.adapters.peft_settings import METADATA
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.convert.tables import Pair
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import write_safetensors

_ENDS = {  # ends of the names of A, B and the magnitude
    "diffusers": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "kohya": ("lora_down.weight", "lora_up.weight", "dora_scale"),
}


def _write(
    kind: str, bundle: Bundle, path: Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write a bundle's adaptation, without its model, in the names of a kind in `_ENDS`.

    diffusers' files hold α in their header, kohya's in tensors. Raises ValueError for a model
    without a LoRA.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a LoRA's file ends in .safetensors")
    if not bundle.lora:
        raise ValueError("this model has no LoRA: it is a workdir with lora.rank that has one")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    nameless = {f"{part}/{ours}" for part, paths in bundle.lora.items() for ours in paths}
    for part, _, prefix, pair in pairs_of(bundle, kind == "kohya"):
        factors = bundle.lora.get(part, {}).get(pair.ours)
        if factors is None:
            continue
        nameless.remove(f"{part}/{pair.ours}")
        for theirs, arrays in _theirs(pair, factors).items():
            module = theirs.removesuffix(".weight")
            if kind == "kohya":
                flat = module.replace(".", "_")
                name = f"{kohya_prefix(prefix, has_two(bundle))}_{flat}"
                tensors[f"{name}.alpha"] = in_memory(np.float32(factors["alpha"]))
            else:
                name = f"{prefix}.{module}"
                _add_settings(settings, prefix, module, factors)
            for end, array in zip(_ENDS[kind], arrays, strict=False):
                laid_out = _magnitude(kind, array, arrays[0].ndim) if array.ndim == 1 else array
                tensors[f"{name}.{end}"] = in_memory(np.ascontiguousarray(laid_out))
    if nameless:
        some = ", ".join(sorted(nameless)[:4]) + (" …" if len(nameless) > 4 else "")
        raise ValueError(f"this format has no name for {len(nameless)} adapted kernels: {some}")
    metadata = {METADATA: json.dumps(settings, sort_keys=True)} if settings else None
    write_safetensors(path, tensors, metadata, progress)


def of_workdir(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """The `modules` of the `LowRank` that a workdir has trained, as its files have them.

    Kernels without a name in diffusers, such as those of a `text` conditioner, have our names.
    """
    modules: dict[str, dict[str, Any]] = {}
    for part, _, prefix, pair in (*pairs_of(bundle), *own_pairs(bundle)):
        factors = bundle.lora.get(part, {}).get(pair.ours)
        for theirs, arrays in _theirs(pair, factors).items() if factors else ():
            by_name = dict(zip(("lora_down", "lora_up", "magnitude"), arrays, strict=False))
            scale = np.float32(factors["alpha"] / factors["down"].shape[-1])
            module = f"{prefix}.{theirs.removesuffix('.weight')}"
            modules[module] = {"weight": {**by_name, "scale": scale}}
    return modules


def _theirs(pair: Pair, factors: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
    """A [r in …], B [out r …] and perhaps the magnitude [out], by module of the format."""
    down, up = (np.asarray(factors[name]) for name in ("down", "up"))
    magnitude = (np.asarray(factors["magnitude"]),) if "magnitude" in factors else ()
    if len(pair.theirs) == 1:
        (a,) = pair.layout.write(down)
        if a.ndim == 2:
            # The layout may change the order of outputs; A has none.
            a, magnitude = down.T, tuple(pair.layout.write(m[None])[0].ravel() for m in magnitude)
        if a.ndim > down.ndim:  # our linear map is a convolution in the format
            b = up.T.reshape(*up.T.shape, *[1] * (a.ndim - 2))
        else:
            (b,) = pair.layout.write(up)
        return {pair.theirs[0]: (a, b, *magnitude)}
    ups = pair.layout.write(up)
    norms = [pair.layout.write(m) for m in magnitude]
    return {
        name: (down.T, ups[i], *(each[i] for each in norms)) for i, name in enumerate(pair.theirs)
    }


def _magnitude(kind: str, norms: np.ndarray, ndim: int) -> np.ndarray:
    """The magnitude as kohya has it, [out 1 …], or PEFT, [out], or [1 out 1 1] of a convolution."""
    if kind == "kohya":
        return norms.reshape(-1, *[1] * (ndim - 1))
    return norms if ndim == 2 else norms.reshape(1, -1, *[1] * (ndim - 2))


def _add_settings(
    settings: dict[str, Any], prefix: str, module: str, factors: Mapping[str, Any]
) -> None:
    alpha = float(factors["alpha"])
    settings |= {f"{prefix}.r": factors["down"].shape[-1], f"{prefix}.lora_alpha": alpha}
    settings[f"{prefix}.use_dora"] = "magnitude" in factors
    # PEFT compares ends of names; only older versions of transformers have the text_model.
    target = module.removeprefix("text_model.")
    settings.setdefault(f"{prefix}.target_modules", []).append(target)


write_diffusers_lora = partial(_write, "diffusers")
write_kohya_lora = partial(_write, "kohya")
