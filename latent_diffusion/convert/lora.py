"""LoRA files in diffusers' names and in kohya's, for the U-Net and CLIP's text encoder.

What others keep apart (q, k, v of CLIP) is one kernel here: their factors then stand side by side,
with a block-diagonal B, and come apart again by its zeros.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert import clip_text, unet
from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.convert.tables import Pair, Table, pairs, prefixed
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import open_tensors, write_safetensors

Factors = dict[str, Any]  # "down" [in r], "up" [r out], "alpha" []
Progress = Callable[[int], Any]


def _diffusers(part: str, module: str) -> tuple[str, str, str]:
    prefix = {"unet": "unet", "clip_text": "text_encoder"}[part]
    name = f"{prefix}.{module}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def _kohya(part: str, module: str) -> tuple[str, str, str]:
    prefix = {"unet": "lora_unet", "clip_text": "lora_te"}[part]
    name = f"{prefix}_{module.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


NAMES = {"diffusers": _diffusers, "kohya": _kohya}
# diffusers' spellings before version 0.20 and 0.30 → today's
_OLD = (
    (r"\.processor\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.processor\.to_out_lora\.", r".to_out.0.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.lora\.down\.", ".lora_A."),
    (r"\.lora\.up\.", ".lora_B."),
    (r"^text_encoder\.(?=encoder\.)", "text_encoder.text_model."),
    (r"^lora_te1_", "lora_te_"),
)


def read_weights(entries: Sequence[str]) -> dict[str, float]:
    """Weights by file, from what a user writes: "FILE:0.8", or "FILE" for 1."""
    weights = {}
    for entry in entries:
        file, colon, weight = entry.rpartition(":")
        try:
            weights[file if colon else entry] = float(weight) if colon else 1.0
        except ValueError as error:
            raise ValueError(f"--lora={entry}: write FILE or FILE:WEIGHT") from error
    return weights


def _modules(bundle: Bundle) -> Iterator[tuple[str, Pair]]:
    """Every kernel that can be adapted, by part, with the modules of theirs that hold it."""
    tables: dict[str, tuple[Part, Table]] = {}
    if bundle.unet is not None:
        tables["unet"] = (
            bundle.unet,
            unet.diffusers_table(bundle.unet.fields, bundle.linear_projections),
        )
    if "clip_text" in bundle.conditioners:
        part = bundle.conditioners["clip_text"]
        table: Table = prefixed(clip_text.transformers_table(part.fields), "text_model.")
        tables["clip_text"] = (part, table)
    for name, (part, table) in tables.items():
        kernels = [k for k, t in part.params.items() if k.endswith("kernel") and len(t.shape) == 2]
        for pair in pairs(table, kernels):
            yield name, pair


def read_lora(path: Path, bundle: Bundle) -> dict[str, dict[str, Factors]]:
    """{part: {path of the kernel: factors}} of a LoRA file for this model.

    Raises ValueError for a file that isn't one, or has tensors with no place in the model.
    """
    tensors = {_today(name): tensor for name, tensor in open_tensors(path).tensors.items()}
    kind = "kohya" if any(".lora_down." in name for name in tensors) else "diffusers"
    left = set(tensors)
    found: dict[str, dict[str, Factors]] = {}
    for part, pair in _modules(bundle):
        modules = [name.removesuffix(".weight") for name in pair.theirs]
        own: list[Any] = []
        for module in modules:
            down, up, alpha = NAMES[kind](part, module)
            left -= {down, up, alpha}
            if down in tensors and up in tensors:
                own.append((tensors[down], tensors[up], tensors.get(alpha)))
            else:
                own.append(None)
        if any(own):
            found.setdefault(part, {})[pair.ours] = _joined(path, bundle, part, pair, own)
    if left or not found:
        some = ", ".join(sorted(left)[:4]) or "none"
        raise ValueError(
            f"{path} is no LoRA of this model: {len(left)} tensors without a place: {some}"
        )
    return found


def _today(name: str) -> str:
    for old, new in _OLD:
        name = re.sub(old, new, name)
    return name


def _joined(path: Path, bundle: Bundle, part: str, pair: Pair, own: list[Any]) -> Factors:
    """Factors of our kernel from those of the modules that it joins; None is an absent one."""
    module = bundle.unet if part == "unet" else bundle.conditioners[part]
    assert module is not None
    rows, columns = module.params[pair.ours].shape
    downs, ups, alpha = [], [], 0.0
    for i, entry in enumerate(own):
        if entry is None:
            continue
        down, up = (_matrix(tensor) for tensor in entry[:2])
        rank = down.shape[0]
        width = columns // len(own)
        if down.shape != (rank, rows) or up.shape != (width, rank):
            raise ValueError(
                f"{path}: {pair.theirs[i]} has factors {down.shape} and {up.shape}; the kernel "
                f"maps {rows} to {width}"
            )
        scale = float(entry[2].read()) / rank if entry[2] is not None else 1.0
        downs.append(down.T)
        blocks = [up if j == i else np.zeros((width, rank), np.float32) for j in range(len(own))]
        ups.append((pair.layout.read(*blocks) if len(own) > 1 else up.T, scale))
        alpha += scale * rank
    down, scales = np.concatenate(downs, 1), {scale for _, scale in ups}
    if len(scales) > 1:  # of q, k and v: each goes into its own B
        return {
            "down": down,
            "up": np.concatenate([scale * up for up, scale in ups]),
            "alpha": np.float32(down.shape[1]),
        }
    return {"down": down, "up": np.concatenate([up for up, _ in ups]), "alpha": np.float32(alpha)}


def _matrix(tensor: Tensor) -> np.ndarray:
    """[out in], of a linear map or of a convolution with a kernel of one position."""
    array = np.asarray(tensor.astype(np.float32).read())
    return array[:, :, 0, 0] if array.ndim == 4 and array.shape[2:] == (1, 1) else array


def with_lora(bundle: Bundle, path: Path, weight: float | int = 1.0) -> Bundle:
    """The model with `weight` times a LoRA file added to its kernels."""
    for part, kernels in read_lora(path, bundle).items():
        bundle = merged(bundle, part, kernels, weight)
    return bundle


def merged(
    bundle: Bundle, part: str, kernels: Mapping[str, Factors], weight: float | int = 1.0
) -> Bundle:
    """The model with `weight` times some factors added to the kernels of one of its parts."""
    own = bundle.unet if part == "unet" else bundle.conditioners[part]
    assert own is not None
    params = dict(own.params)
    for path, factors in kernels.items():
        params[path] = _added(own.params[path], factors, weight)
    new = Part(own.fields, params, own.unused)
    if part == "unet":
        return replace(bundle, unet=new)
    return replace(bundle, conditioners={**bundle.conditioners, part: new})


def _added(kernel: Tensor, factors: Factors, weight: float | int) -> Tensor:
    def read() -> np.ndarray:
        scale = np.float32(weight * factors["alpha"] / factors["down"].shape[1])
        base = np.asarray(kernel.read(), np.float32)
        return (base + scale * (factors["down"] @ factors["up"])).astype(kernel.dtype)

    return Tensor(kernel.shape, kernel.dtype, read)


def write_diffusers_lora(bundle: Bundle, path: Path, progress: Progress = lambda n: None) -> None:
    """Write a bundle's adaptation alone, in diffusers' names."""
    _write(bundle, path, "diffusers", progress)


def write_kohya_lora(bundle: Bundle, path: Path, progress: Progress = lambda n: None) -> None:
    """Write a bundle's adaptation alone, in kohya's names."""
    _write(bundle, path, "kohya", progress)


def _write(bundle: Bundle, path: Path, names: str, progress: Progress) -> None:
    """diffusers' files hold no α, which goes into B."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a LoRA's file ends in .safetensors")
    if not bundle.lora:
        raise ValueError("this model has no LoRA: it is a workdir with lora.rank that has one")
    lora = bundle.lora
    make = NAMES[names]
    tensors: dict[str, Tensor] = {}
    for part, pair in _modules(bundle):
        factors = lora.get(part, {}).get(pair.ours)
        if factors is None:
            continue
        ups = pair.layout.write(factors["up"]) if len(pair.theirs) > 1 else (factors["up"].T,)
        for name, up in zip(pair.theirs, ups, strict=True):
            down, up, alpha = _own_block(factors, up)
            if not up.size:
                continue
            keys = make(part, name.removesuffix(".weight"))
            if names == "kohya":
                tensors[keys[2]] = in_memory(np.float32(alpha))
            elif alpha != down.shape[0]:
                up = np.float32(alpha / down.shape[0]) * up
            tensors[keys[0]], tensors[keys[1]] = in_memory(down), in_memory(up)
    if not tensors:
        raise ValueError("there is no LoRA to save: none of its kernels has a name in this format")
    write_safetensors(path, tensors, progress=progress)


def _own_block(factors: Factors, up: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A [r in], B [out r] and α of one module of a joint kernel, without what is zero for it."""
    rank = up.shape[1]
    used = np.flatnonzero(np.any(up, 0))
    if not len(used) and factors["up"].any():
        return factors["down"].T[:0], up[:, :0], 0.0
    if not len(used):  # nothing learned yet
        used = np.arange(rank)
    alpha = float(factors["alpha"]) * len(used) / rank
    return np.ascontiguousarray(factors["down"].T[used]), up[:, used], alpha
