"""LoRA files in diffusers' names and in kohya's, for the U-Net and CLIP's text encoder.

CLIP's q, k and v, which others separate, are one kernel here. The factors of the three then stand
side by side, with a block-diagonal B, and its zeros separate them again.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert import clip_text, unet
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.convert.tables import Pair, Table, pairs, prefixed
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import open_tensors, write_safetensors

Factors = dict[str, Any]  # "down" [in r], "up" [r out], "alpha" []


def _diffusers(part: str, module: str) -> list[str]:
    name = f"{'unet' if part == 'unet' else 'text_encoder'}.{module}"
    return [f"{name}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")]


def _kohya(part: str, module: str) -> list[str]:
    name = f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}"
    return [f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]


NAMES = {"diffusers": _diffusers, "kohya": _kohya}  # of A, B and α of a module
# Spellings of diffusers before versions 0.20 and 0.30 → today's
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
    """Weights by file, from a user's entries: "FILE:0.8", or "FILE" for 1."""
    weights = {}
    for entry in entries:
        file, colon, weight = entry.rpartition(":")
        try:
            weights[file if colon else entry] = float(weight) if colon else 1.0
        except ValueError as error:
            raise ValueError(f"--lora={entry}: write FILE or FILE:WEIGHT") from error
    return weights


def _modules(bundle: Bundle) -> Iterator[tuple[str, Tensor, Pair]]:
    """Every kernel that can be adapted: its part, the kernel, and the modules that hold it."""
    for name, part in bundle.parts():
        table: Table
        if name == "unet":
            table = unet.diffusers_table(part.fields, bundle.linear_projections)
        elif name == "clip_text":
            table = prefixed(clip_text.transformers_table(part.fields), "text_model.")
        else:
            continue
        kernels = [k for k, t in part.params.items() if k.endswith("kernel") and len(t.shape) == 2]
        for pair in pairs(table, kernels):
            yield name, part.params[pair.ours], pair


def read_lora(path: Path, bundle: Bundle) -> dict[str, dict[str, Factors]]:
    """Read a LoRA file for this model: {part: {path of the kernel: factors}}.

    Raises ValueError for a file that is no LoRA, or has tensors without a place in the model.
    """
    tensors = {_today(name): tensor for name, tensor in open_tensors(path).tensors.items()}
    kind = "kohya" if any(".lora_down." in name for name in tensors) else "diffusers"
    left = set(tensors)
    factors: dict[str, dict[str, Factors]] = {}
    for part, kernel, pair in _modules(bundle):
        triples: list[Any] = []
        for name in pair.theirs:
            down, up, alpha = names = NAMES[kind](part, name.removesuffix(".weight"))
            left -= set(names)
            both = down in tensors and up in tensors
            triples.append((tensors[down], tensors[up], tensors.get(alpha)) if both else None)
        if any(triples):
            factors.setdefault(part, {})[pair.ours] = _joined(path, kernel, pair, triples)
    if left or not factors:
        some = ", ".join(sorted(left)[:4]) or "none"
        raise ValueError(
            f"{path} is no LoRA of this model: {len(left)} tensors without a place: {some}"
        )
    return factors


def _today(name: str) -> str:
    for old, new in _OLD:
        name = re.sub(old, new, name)
    return name


def _joined(path: Path, kernel: Tensor, pair: Pair, triples: list[Any]) -> Factors:
    """The factors of our kernel from (A, B, α) of each module that it joins, if the file has it."""
    rows, width = kernel.shape[0], kernel.shape[1] // len(triples)
    downs, ups, scales = [], [], []
    for i, triple in enumerate(triples):
        if triple is None:
            continue
        down, up = (_matrix(tensor) for tensor in triple[:2])
        rank = down.shape[0]
        if down.shape != (rank, rows) or up.shape != (width, rank):
            raise ValueError(
                f"{path}: {pair.theirs[i]} has factors {down.shape} and {up.shape}; the kernel "
                f"maps {rows} to {width}"
            )
        blocks = [up if j == i else np.zeros_like(up) for j in range(len(triples))]
        downs.append(down.T)
        ups.append(pair.layout.read(*blocks) if len(triples) > 1 else up.T)
        scales.append(1.0 if triple[2] is None else float(triple[2].read()) / rank)
    down, scale = np.concatenate(downs, 1), scales[0]
    if len(set(scales)) > 1:  # of q, k and v: each goes into its B
        ups, scale = [s * up for s, up in zip(scales, ups, strict=True)], 1.0
    return {"down": down, "up": np.concatenate(ups), "alpha": np.float32(scale * down.shape[1])}


def _matrix(tensor: Tensor) -> np.ndarray:
    """[out in], of a linear map or of a convolution over one position."""
    array = np.asarray(tensor.astype(np.float32).read())
    return array[:, :, 0, 0] if array.ndim == 4 and array.shape[2:] == (1, 1) else array


def with_lora(bundle: Bundle, path: Path, weight: float | int = 1.0) -> Bundle:
    """Return the model with `weight` times a LoRA file added to its kernels."""
    for part, kernels in read_lora(path, bundle).items():
        bundle = merged(bundle, part, kernels, weight)
    return bundle


def merged(
    bundle: Bundle, name: str, kernels: Mapping[str, Factors], weight: float | int = 1.0
) -> Bundle:
    """Return the model with `weight` times some factors added to the kernels of the part `name`."""
    part = dict(bundle.parts())[name]
    added = {path: _added(part.params[path], f, weight) for path, f in kernels.items()}
    return bundle.with_part(name, replace(part, params={**part.params, **added}))


def _added(kernel: Tensor, factors: Factors, weight: float | int) -> Tensor:
    def read() -> np.ndarray:
        scale = np.float32(weight * factors["alpha"] / factors["down"].shape[1])
        base = np.asarray(kernel.read(), np.float32)
        return (base + scale * (factors["down"] @ factors["up"])).astype(kernel.dtype)

    return Tensor(kernel.shape, kernel.dtype, read)


def _write(
    kind: str, bundle: Bundle, path: Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write a bundle's adaptation, without its model, in the names of a kind in NAMES.

    diffusers' files hold no α, which goes into B. Raises ValueError for a model without a LoRA.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a LoRA's file ends in .safetensors")
    if not bundle.lora:
        raise ValueError("this model has no LoRA: it is a workdir with lora.rank that has one")
    tensors: dict[str, Tensor] = {}
    for part, _, pair in _modules(bundle):
        factors = bundle.lora.get(part, {}).get(pair.ours)
        if factors is None:
            continue
        ups = pair.layout.write(factors["up"]) if len(pair.theirs) > 1 else (factors["up"].T,)
        for name, block in zip(pair.theirs, ups, strict=True):
            down, up, alpha = _block(factors, block)
            if not up.size:
                continue
            names = NAMES[kind](part, name.removesuffix(".weight"))
            if kind == "kohya":
                tensors[names[2]] = in_memory(np.float32(alpha))
            elif alpha != down.shape[0]:
                up = np.float32(alpha / down.shape[0]) * up
            tensors[names[0]], tensors[names[1]] = in_memory(down), in_memory(up)
    if not tensors:
        raise ValueError("there is no LoRA to save: none of its kernels has a name in this format")
    write_safetensors(path, tensors, progress=progress)


write_diffusers_lora = partial(_write, "diffusers")
write_kohya_lora = partial(_write, "kohya")


def _block(factors: Factors, up: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A [r in], B [out r] and α of one module of a joint kernel, without its columns of zeros."""
    rank = up.shape[1]
    used = np.flatnonzero(np.any(up, 0))
    if not factors["up"].any():  # nothing learned yet
        used = np.arange(rank)
    alpha = float(factors["alpha"]) * len(used) / rank
    return np.ascontiguousarray(factors["down"].T[used]), up[:, used], alpha
