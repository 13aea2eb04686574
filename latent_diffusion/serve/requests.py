"""Reads requests in JSON as arguments of `Model.sample`, or raises errors of one line."""

import base64
import binascii
import dataclasses
import io
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.rng import example_keys, seed_key
from latent_diffusion.data import pictures
from latent_diffusion.data.transforms import to_float
from latent_diffusion.generation.adapters import with_words
from latent_diffusion.generation.conditions import argument
from latent_diffusion.generation.conditions import size_of as implied_size
from latent_diffusion.generation.controls import size_of
from latent_diffusion.generation.model import Model
from latent_diffusion.generation.prompts import num_chunks
from latent_diffusion.generation.sampling import read_hint
from latent_diffusion.generation.start_picture import changes_pictures, fitted, usual_size
from latent_diffusion.process.options import OPTIONS, Option
from latent_diffusion.process.plan import plan, plan_prior, prior_options
from latent_diffusion.serve.openai import BY_ALPHA

MAX_PICTURED = 8  # control nets of a request, and image prompts


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits: images of a request, pixels of a picture, steps, requests that wait."""

    max_images: int = 16
    max_pixels: int = 2**22
    max_steps: int = 1000
    max_waiting: int = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """One condition, of which `num_images` pictures are made.

    settings: the request's JSON with its seed, but without pictures, for the text in a PNG. values:
    the condition's arguments of `Model.sample`, each of one example. shared: arguments that all
    images of a call share. pictured: control nets and image prompts, by argument. chunks: of the
    longest prompt if prompts have weights, since a call fills all up to the same number.
    """

    settings: Mapping[str, Any]
    seed: int
    num_images: int
    values: Mapping[str, Any]
    shared: Mapping[str, Any]
    pictured: Mapping[str, Sequence["Pictured"]]
    chunks: int = 1

    @property
    def group(self) -> str:
        """Equal for requests that one call of `Model.sample` can answer."""
        shapes = {name: getattr(value, "shape", None) for name, value in self.values.items()}
        shared = {**self.shared, "adapters": self.settings.get("adapters", [])}
        for name, entries in self.pictured.items():
            shared[name] = [(e.name, e.picture.shape, e.weight) for e in entries]
        return repr((sorted(shapes.items()), sorted(shared.items()), self.chunks))


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A control net or an IP-Adapter, the picture [1 H W 3] that it sees, and its weight."""

    name: str
    adapter: Any
    picture: np.ndarray
    weight: float


class Upload(io.BytesIO):
    """A picture in a request, with the name of its field, for error messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def read(
    data: Any, model: Model, limits: Limits, adapters: Mapping[str, Any] | None = None
) -> Request:
    """A request from JSON. Raises ValueError, in one line, which names the field.

    adapters: loaded adapters, by the names that requests may use.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a request is a JSON object, not {type(data).__name__}")
    data = {name: value for name, value in data.items() if value is not None}
    options = options_of(model)
    option_names = {name for name, option in options.items() if option.flag}
    allowed = {*_CONDITIONS, *_SHARED, *PICTURED, *option_names}
    if unknown := sorted(set(data) - allowed):
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(allowed))}")
    num_images = _integer("num_images", data.get("num_images", 1), 1, limits.max_images)
    seed = _seed(data.get("seed", secrets.randbits(32)))
    if "num_steps" in options:
        usual = model.defaults.get("num_steps") or options["num_steps"].default
        _integer("num_steps", data.get("num_steps", usual), 1, limits.max_steps)
    shared: dict[str, Any] = {name: data[name] for name in option_names if name in data}
    _check_options(model, shared)
    size = _size(data.get("image_size"), limits)
    if size is not None:
        shared["image_size"] = size
    if "more_prompts" in data:
        shared["more_prompts"] = _pairs("more_prompts", data["more_prompts"], limits)
    if "prompt_weights" in data:
        if not isinstance(data["prompt_weights"], bool):
            raise ValueError(
                f"prompt_weights={str(data['prompt_weights'])[:40]} must be true or false"
            )
        shared["prompt_weights"] = data["prompt_weights"]
    if "adapters" in data:
        shared["adapters"] = _adapters(data["adapters"], adapters or {}, limits)
    values = {
        name: reader(name, data[name], limits)
        for name, reader in _CONDITIONS.items()
        if name in data
    }
    pictured = {
        name: _pictured(name, data[name], adapters or {}, limits)
        for name in PICTURED
        if name in data
    }
    hints = [(e.adapter, e.picture, e.weight) for e in pictured.get("controls", ())]
    preferred = size or size_of(hints)
    if preferred is None:
        _check_implied(model, values, limits)
    start = (values.get("image"), values.get("mask"), data.get("strength"))
    fit = preferred or usual_size(model, values)
    values |= fitted(model.conditioner.keys, fit, *start)
    with_pictures = {name for name, read in _CONDITIONS.items() if read in _PICTURE_READERS}
    settings = {k: v for k, v in data.items() if k not in {*with_pictures, *PICTURED}}
    settings |= {"seed": seed, "num_images": num_images}
    chunks = 1
    if shared.get("prompt_weights"):
        texts = [values[name] for name in ("prompts", "negative_prompts") if name in values]
        texts += [text for text, _ in shared.get("more_prompts", ())]
        adapters_of = shared.get("adapters", ())  # which may add words
        adapted = model if model.denoiser is None else with_words(model, adapters_of)
        chunks = num_chunks(adapted, texts)
    return Request(settings, seed, num_images, values, shared, pictured, chunks)


def options_of(model: Model) -> Mapping[str, Option]:
    """The options of the model's sampling, by name."""
    return OPTIONS if model.prior is None else prior_options(model.prior.transformer.causal)


def _check_options(model: Model, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that sampling would refuse."""
    if model.prior is not None:
        plan_prior(model.defaults, options, model.prior.transformer.causal)
    elif (denoiser := model.denoiser) is not None:
        plan(denoiser.schedule, denoiser.prediction, model.defaults, options)


def with_own_mask(fields: dict[str, Any], model: Model, limits: Limits) -> dict[str, Any]:
    """The fields, with the transparent parts of the picture as its mask if there is no other.

    A model that takes the picture as a condition alone has no use for a mask.
    """
    changes = changes_pictures(model.conditioner.keys)
    if "image" not in fields or "mask" in fields or not changes:
        return fields
    if not pictures.is_transparent(_upload("image", fields["image"], limits)):
        return fields
    return {**fields, "mask": BY_ALPHA + fields["image"]}


def call(model: Model, requests: Sequence[Request]) -> dict[str, Any]:
    """Arguments of a `Model.sample` call for requests of the same group, image after image."""
    conditioner = model.conditioner
    conditions = {argument(key) for key in (*conditioner.keys, *conditioner.optional)}
    keys = [example_keys(seed_key(request.seed), request.num_images) for request in requests]
    joined: dict[str, Any] = {}
    for name in requests[0].values:
        rows = [request.values[name] for request in requests for _ in range(request.num_images)]
        joined[name] = np.concatenate(rows) if isinstance(rows[0], np.ndarray) else rows
    for name, entries in requests[0].pictured.items():
        joined[name] = []
        for i, entry in enumerate(entries):
            seen = _rows([(r.pictured[name][i].picture, r.num_images) for r in requests])
            joined[name].append((entry.adapter, seen, entry.weight))
    if not conditions & joined.keys():
        joined["num_images"] = sum(request.num_images for request in requests)
    return {"rng": jnp.concatenate(keys), **joined, **requests[0].shared}


def _rows(pictures: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """A row for each image of a call; one row if all images have the same picture."""
    if len(pictures) == 1:
        return pictures[0][0]
    return np.concatenate([np.repeat(picture, count, axis=0) for picture, count in pictures])


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={str(value)[:40]} must be a whole number in [{low}, {high}]")
    return value


def _seed(value: Any) -> int:
    """A seed; as a text it is exact in languages whose numbers have 53 bits."""
    whole = isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value)
    return _integer("seed", int(value) if whole else value, 0, 2**64 - 1)


def _size(value: Any, limits: Limits) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"image_size={str(value)[:40]} must be [height, width]")
    height, width = (_integer("image_size", side, 1, limits.max_pixels) for side in value)
    _check_pixels("image_size", height, width, limits)
    return height, width


def _check_pixels(name: str, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.max_pixels:
        raise ValueError(f"{name}: {height}×{width} are more than {limits.max_pixels} pixels")


def _check_implied(model: Model, values: Mapping[str, Any], limits: Limits) -> None:
    """Raise ValueError if the conditions imply a picture that is too large."""
    if implied := implied_size(values, model.downsampling):
        _check_pixels("the picture of these conditions", *implied, limits)


def _pairs(name: str, value: Any, limits: Limits) -> list[tuple[str, float]]:
    if not isinstance(value, list) or any(not isinstance(p, list) or len(p) != 2 for p in value):
        raise ValueError(f"{name}: write [[text, weight], …]")
    if len(value) > 8:
        raise ValueError(f"{name}: {len(value)} pairs, at most 8")
    pairs = [(_text(name, text, limits), weight) for text, weight in value]
    return [
        (text, float(_score(f"{name}: the weight of {text[:80]!r}", weight, limits)[0]))
        for text, weight in pairs
    ]


def _adapters(value: Any, loaded: Mapping[str, Any], limits: Limits) -> list[tuple[Any, float]]:
    pairs = _pairs("adapters", value, limits)
    return [(_loaded("adapters", name, loaded), weight) for name, weight in pairs]


def _pictured(field: str, value: Any, loaded: Mapping[str, Any], limits: Limits) -> list[Pictured]:
    """The adapters of a field, each with its picture and weight."""
    if not isinstance(value, list) or any(not isinstance(e, list) or len(e) != 3 for e in value):
        raise ValueError(f"{field}: write [[adapter, picture in base64, weight], …]")
    if len(value) > MAX_PICTURED:
        raise ValueError(f"{field}: {len(value)} entries, at most {MAX_PICTURED}")
    entries = []
    for name, content, weight in value:
        adapter = _loaded(field, str(name), loaded)
        picture = PICTURED[field](f"{field}: the picture of {name}", content, limits)
        weight = float(_score(f"{field}: the weight of {name}", weight, limits)[0])
        entries.append(Pictured(name, adapter, picture, weight))
    return entries


def _loaded(field: str, name: str, loaded: Mapping[str, Any]) -> Any:
    """The adapter of a name that `Model.sample` takes as this argument; ValueError for others."""
    known = {name: adapter for name, adapter in loaded.items() if adapter.argument == field}
    if name not in known:
        names = ", ".join(known) or "none was loaded"
        raise ValueError(f"{field}: unknown adapter {name[:80]!r}; known: {names}")
    return known[name]


def _text(name: str, value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or len(value) > 10_000:
        raise ValueError(f"{name} must be one text of at most 10,000 characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half of a surrogate pair, which is no character") from None
    return value


def _whole(name: str, value: Any, limits: Limits) -> int:
    return _integer(name, value, 0, 2**31 - 1)


def _score(name: str, value: Any, limits: Limits) -> np.ndarray:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={str(value)[:40]} must be a number")
    return np.full(1, value, np.float32)


def _two(name: str, value: Any, limits: Limits) -> np.ndarray:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name}={str(value)[:40]} must be two whole numbers")
    return np.array([[_integer(name, number, 0, 2**24) for number in value]], np.int32)


def _layout(name: str, value: Any, limits: Limits) -> list[Any]:
    fits = isinstance(value, list) and 1 <= len(value) <= 100
    if not fits or any(not isinstance(entry, list) for entry in value):
        raise ValueError(f"{name}: write 1 to 100 objects [[class, [left, top, right, bottom]], …]")
    return value


def _array(name: str, value: Any, limits: Limits) -> np.ndarray:
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: write lists of numbers of equal lengths") from None
    if array.size > limits.max_pixels:
        raise ValueError(f"{name}: {array.size} numbers, at most {limits.max_pixels}")
    return array[None]


def _upload(name: str, value: Any, limits: Limits) -> Upload:
    """The bytes of a picture in base64 or in a data URL; ValueError for too many pixels."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a picture in base64")
    _, comma, content = value.partition(",") if value.startswith("data:") else ("", ",", value)
    try:
        file = Upload(base64.b64decode(content, validate=True) if comma else b"", name)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} must be a picture in base64") from None
    _check_pixels(name, *pictures.stored_size(file), limits)
    file.seek(0)
    return file


def _picture(name: str, value: Any, limits: Limits) -> np.ndarray:
    return to_float(pictures.read_image(_upload(name, value, limits)))[None]


def _hint(name: str, value: Any, limits: Limits) -> np.ndarray:
    return read_hint(_upload(name, value, limits))


def _map(read: Callable[[Upload], np.ndarray]) -> Callable[[str, Any, Limits], np.ndarray]:
    return lambda name, value, limits: read(_upload(name, value, limits))[None]


_levels, _depth = map(_map, (pictures.read_levels, pictures.read_depth))


def _mask(name: str, value: Any, limits: Limits) -> np.ndarray:
    by_alpha = isinstance(value, str) and value.startswith(BY_ALPHA)
    read = pictures.read_transparency if by_alpha else pictures.read_mask
    return _map(read)(name, value, limits)


_PICTURE_READERS = (_picture, _mask, _levels, _depth)
# argument of `Model.sample` -> its reader
_CONDITIONS: dict[str, Callable[[str, Any, Limits], Any]] = {
    "prompts": _text,
    "negative_prompts": _text,
    "class_labels": _whole,
    "layout": _layout,
    "image": _picture,
    "mask": _mask,
    "segmentation": _levels,
    "low_res": _picture,
    "noise_level": _whole,
    "depth": _depth,
    "neighbours": _array,
    "image_embedding": _array,
    "original_size": _two,
    "crop_top_left": _two,
    "target_size": _two,
    "aesthetic_score": _score,
    "negative_original_size": _two,
    "negative_crop_top_left": _two,
    "negative_target_size": _two,
    "negative_aesthetic_score": _score,
}
# arguments of `Model.sample` for adapters that see a picture -> its reader
PICTURED: dict[str, Callable[[str, Any, Limits], np.ndarray]] = {
    "controls": _hint,
    "image_prompts": _picture,
}
_SHARED = ("seed", "num_images", "image_size", "more_prompts", "adapters", "prompt_weights")
