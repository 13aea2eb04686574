"""What is in a file, in words: for those who ask before they load it."""

from typing import Any

import numpy as np

from latent_diffusion.convert.bundle import Bundle, Part, input_widths
from latent_diffusion.files.tensor import in_memory

_TEXT = {"text", "clip_text", "bert"}
_IMAGE = {"clip_image", "image_embedding"}


def describe(bundle: Bundle) -> str:
    """A line for every part, how the model is run, and what it lacks."""
    rows = [("model", _kind(bundle))]
    rows += [(name, _part(part)) for name, part in bundle.parts()]
    if bundle.autoencoder is not None:
        rows.append(("latents", _latents(bundle)))
    if bundle.unet is not None:
        rows += [("inputs", _inputs(bundle.unet)), *_diffusion(bundle)]
    if "parameters" in bundle.notes:
        rows.append(("parameters", bundle.notes["parameters"]))
    unused = {name: len(part.unused) for name, part in bundle.parts() if part.unused}
    if unused:
        told = ", ".join(f"{count} of {name}" for name, count in unused.items())
        rows.append(("unused", f"{told}: tensors that nothing needs"))
    rows.append(("missing", ", ".join(missing(bundle)) or "nothing"))
    return "\n".join(f"{name:18s}{text}" for name, text in rows)


def missing(bundle: Bundle) -> list[str]:
    """What would have to be added for the model to make pictures of its conditions."""
    absent = []
    if bundle.autoencoder is None:
        absent.append("a first stage")
    if bundle.unet is None:
        return [*absent, "a denoiser"] if bundle.autoencoder is not None else absent
    _, context, vector = input_widths(bundle.unet)
    given = bundle.conditioners.keys()
    if context and not given & (_TEXT | {"class_label", "layout", "neighbours", *_IMAGE}):
        absent.append(f"a conditioner (context of width {context})")
    if vector and not given & _IMAGE:
        absent.append(f"a conditioner (vector of width {vector})")
    if given & _TEXT and bundle.tokenizer is None:
        absent.append("a tokenizer")
    return absent


def _kind(bundle: Bundle) -> str:
    if "pipeline" in bundle.notes:
        return bundle.notes["pipeline"]
    halves = {"first stage": bundle.autoencoder, "denoiser": bundle.unet}
    there = [name for name, part in halves.items() if part is not None]
    there += [f"conditioner {name}" for name in bundle.conditioners]
    return ", ".join(there) or "empty"


def _part(part: Part) -> str:
    tensors = part.params.values()
    dtypes = sorted({str(tensor.dtype) for tensor in tensors}) or ["no parameters"]
    size, count = sum(tensor.size for tensor in tensors), len(part.params)
    return f"{size / 1e6:10.2f} M in {count} arrays, {', '.join(dtypes)}"


def _latents(bundle: Bundle) -> str:
    assert bundle.autoencoder is not None
    fields = bundle.autoencoder.fields
    kind = fields["regularization"]
    if kind == "identity":
        return "pixels"
    side = bundle.image_size // bundle.downsampling
    scale = np.round(np.asarray(in_memory(np.asarray(bundle.scale_factor)).read()), 5).tolist()
    return f"{kind}, f = {bundle.downsampling}, {side}² × {fields['embed_dim']}, scale {scale}"


def _inputs(unet: Part) -> str:
    channels, context, vector = input_widths(unet)
    told = [f"{channels} channels"]
    told += [f"context {context}"] if context else []
    told += [f"vector {vector}"] if vector else []
    return ", ".join(told)


def _diffusion(bundle: Bundle) -> list[tuple[str, str]]:
    own: Any = bundle.diffusion
    ends = f"{own['beta_start']:g} … {own['beta_end']:g}, T = {own['num_timesteps']}"
    zero = ", zero terminal SNR" if own["zero_terminal_snr"] else ""
    rows = [("prediction", own["prediction"]), ("schedule", f"{own['schedule']} {ends}{zero}")]
    if bundle.sampling:
        rows.append(("sampling", ", ".join(f"{k} {v}" for k, v in bundle.sampling.items())))
    return rows
