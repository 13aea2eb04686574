"""A PNG contains the settings that reproduce it, in two chunks of text.

"latent_diffusion" has them as JSON. "parameters" is the text of A1111's web UI, which other
programs read; this module reads it, too.
"""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latent_diffusion.runtime.metrics import as_picture

JSON_KEY, TEXT_KEY = "latent_diffusion", "parameters"
# A1111's samplers, without the spacing's name at the end -> names of `process.samplers.SAMPLERS`
SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2_ancestral",
    "DPM++ 2S a": "dpm_solver_pp_2s_ancestral",
    "DPM++ 2M": "dpm_solver_pp_2m",
    "DPM++ SDE": "dpm_solver_pp_sde",
    "DPM++ 2M SDE": "dpm_solver_pp_2m_sde",
    "DPM++ 3M SDE": "dpm_solver_pp_3m_sde",
    "DDIM": "ddim",
    "PLMS": "plms",
    "UniPC": "unipc",
    "LCM": "lcm",
}
SPACINGS = {"Karras": "karras", "Exponential": "exponential", "Beta": "beta"}
# A pair "name: value", or what isn't one up to the next comma: no letter is looked at twice.
_PAIR = re.compile(r'([\w\s/-]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)|[^,]*(?:,|$)')


def to_png(
    image: np.ndarray, settings: Mapping[str, Any], model: str, defaults: Mapping[str, Any]
) -> bytes:
    """The bytes of a PNG of a uint8 picture [H W C].

    settings: a request's JSON; empty writes no text. model: its name. defaults: the model's, for
    settings that the request leaves out.
    """
    info, out = PngInfo(), io.BytesIO()
    if settings:
        info.add_itxt(JSON_KEY, json.dumps(dict(settings), ensure_ascii=False))
        size = {"image_size": image.shape[:2]}
        info.add_itxt(TEXT_KEY, to_text({**defaults, **settings, **size}, model))
    as_picture(image).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def to_text(settings: Mapping[str, Any], model: str) -> str:
    """Settings as text of A1111's web UI; unknown samplers appear by their names here."""
    lines = [settings.get("prompts", "")]
    if "negative_prompts" in settings:
        lines.append(f"Negative prompt: {settings['negative_prompts']}")
    names = {name: foreign for foreign, name in SAMPLERS.items()}
    sampler = names.get(settings.get("sampler", ""), settings.get("sampler"))
    spacing = {name: foreign for foreign, name in SPACINGS.items()}.get(settings.get("spacing", ""))
    height, width = settings.get("image_size") or (None, None)
    pairs = {
        "Steps": settings.get("num_steps"),
        "Sampler": sampler,
        "Schedule type": spacing,
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": None if height is None else f"{width}x{height}",
        "Denoising strength": settings.get("strength"),
        "Model": re.split(r"[\\/]", model.rstrip("\\/"))[-1].replace(",", " "),
    }
    lines.append(", ".join(f"{k}: {v}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def from_png(file: Any) -> dict[str, Any]:
    """The settings in a PNG, as fields of a request. Raises ValueError if there are none.

    The request is that of all pictures of the call; which of them this is is left out.

    file: a path, or a file in binary mode.
    """
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
    except Exception as error:  # decoders raise errors of all kinds
        raise ValueError(f"not a PNG that can be read: {error}") from None
    if JSON_KEY in texts:
        try:
            settings = json.loads(texts[JSON_KEY])
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"the text {JSON_KEY!r} in this PNG is no JSON object")
        settings.pop("image_index", None)
        return settings
    if TEXT_KEY in texts:
        return from_text(texts[TEXT_KEY])
    raise ValueError("this PNG carries no settings")


def from_text(text: str) -> dict[str, Any]:
    """The settings in a text of A1111's web UI; settings without counterpart are left out."""
    lines = text.strip().split("\n")
    last = lines.pop() if "Steps:" in lines[-1] else ""
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    if prompt.startswith("Negative prompt:"):
        prompt, negative = "", prompt.removeprefix("Negative prompt:")
    found = (match for match in _PAIR.finditer(last) if match[1])
    pairs = {match[1].strip(): match[2].strip().strip('"') for match in found}
    if any(key.startswith("Hires ") for key in pairs):  # then the strength is that of a second pass
        pairs.pop("Denoising strength", None)
    settings: dict[str, Any] = {"prompts": prompt.strip()}
    if negative.strip():
        settings["negative_prompts"] = negative.strip()
    sampler, _, schedule = pairs.get("Sampler", "").rpartition(" ")
    if schedule not in SPACINGS:
        sampler, schedule = pairs.get("Sampler", ""), pairs.get("Schedule type", "")
    settings |= {"sampler": SAMPLERS.get(sampler, sampler)} if sampler else {}
    settings |= {"spacing": SPACINGS[schedule]} if schedule in SPACINGS else {}
    numbers = {
        "num_steps": ("Steps", int),
        "guidance_scale": ("CFG scale", float),
        "seed": ("Seed", int),
        "strength": ("Denoising strength", float),
    }
    for name, (key, kind) in numbers.items():
        try:
            settings |= {name: kind(pairs[key])} if key in pairs else {}
        except ValueError:
            raise ValueError(f"{key}: {pairs[key]!r} is no number") from None
    if size := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        settings["image_size"] = [int(size[2]), int(size[1])]
    return settings
