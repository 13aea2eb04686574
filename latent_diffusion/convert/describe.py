"""A summary of a file's contents, for `python -m latent_diffusion.convert --dry_run`."""

import numpy as np

from latent_diffusion.convert.bundle import Bundle, Part, input_widths

_TEXT = {"text", "clip_text", "clip_text_2", "t5_text", "bert"}
_IMAGE = {"clip_image", "image_embedding"}
_CONTEXT = _TEXT | _IMAGE | {"class_label", "layout", "neighbours"}
_VECTOR = _IMAGE | {"clip_text_2", "sizes", "class_label", "bert"}


def describe(bundle: Bundle) -> str:
    """Return lines for each part, for the schedule and sampling, and for the absent parts."""
    rows = [("model", _kind(bundle))]
    rows += [(name, _part(part)) for name, part in bundle.parts()]
    if bundle.autoencoder is not None:
        rows.append(("latents", _latents(bundle, bundle.autoencoder)))
    if bundle.denoiser is not None:
        channels, context, vector = input_widths(bundle.denoiser[1])
        inputs = f"{channels} channels" + (f", context {context}" if context else "")
        inputs += f", vector {vector}" if vector else ""
        rows += [("inputs", inputs), *_diffusion(bundle)]
    if "parameters" in bundle.notes:
        rows.append(("parameters", bundle.notes["parameters"]))
    unused = [f"{len(part.unused)} of {name}" for name, part in bundle.parts() if part.unused]
    if unused:
        rows.append(("unused", f"{', '.join(unused)}: tensors that nothing needs"))
    rows.append(("missing", ", ".join(missing(bundle)) or "nothing"))
    return "\n".join(f"{name:18s}{text}" for name, text in rows)


def missing(bundle: Bundle) -> list[str]:
    """Return the parts that the model lacks, but needs to make pictures from its conditions."""
    absent = ["a first stage"] if bundle.autoencoder is None else []
    if bundle.denoiser is None:
        return absent or (["a denoiser"] if bundle.prior is None else [])
    _, context, vector = input_widths(bundle.denoiser[1])
    names = bundle.conditioners.keys()
    if context and not names & _CONTEXT:
        absent.append(f"a conditioner (context of width {context})")
    if vector and not names & _VECTOR:
        absent.append(f"a conditioner (vector of width {vector})")
    if names & _TEXT and bundle.tokenizer is None:
        absent.append("a tokenizer")
    return absent


def _kind(bundle: Bundle) -> str:
    if "pipeline" in bundle.notes:
        return bundle.notes["pipeline"]
    halves = {"first stage": bundle.autoencoder, "denoiser": bundle.denoiser}
    halves["prior"] = bundle.prior
    present = [name for name, part in halves.items() if part is not None]
    return ", ".join(present + [f"conditioner {name}" for name in bundle.conditioners]) or "empty"


def _part(part: Part) -> str:
    tensors = part.params.values()
    dtypes = sorted({str(tensor.dtype) for tensor in tensors}) or ["no parameters"]
    size, count = sum(tensor.size for tensor in tensors), len(part.params)
    return f"{size / 1e6:10.2f} M in {count} arrays, {', '.join(dtypes)}"


def _latents(bundle: Bundle, autoencoder: Part) -> str:
    kind, f = autoencoder.fields["regularization"], bundle.downsampling
    if kind == "identity":
        return "pixels"
    side = bundle.latent_size
    size = f"{side}²" if isinstance(side, int) else f"{side[0]} × {side[1]}"
    size += f" × {autoencoder.fields['embed_dim']}"
    scale = np.round(np.asarray(bundle.scale_factor, np.float64), 5).tolist()
    return f"{kind}, f = {f}, {size}, scale {scale}"


def _diffusion(bundle: Bundle) -> list[tuple[str, str]]:
    fields = bundle.diffusion
    ends = f"{fields['beta_start']:g} … {fields['beta_end']:g}, T = {fields['num_timesteps']}"
    zero = ", zero terminal SNR" if fields["zero_terminal_snr"] else ""
    schedule = f"{fields['schedule']} {ends}{zero}"
    rows = [("prediction", fields["prediction"]), ("schedule", schedule)]
    if bundle.sampling:
        rows.append(("sampling", ", ".join(f"{k} {v}" for k, v in bundle.sampling.items())))
    return rows
