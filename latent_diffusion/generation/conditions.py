"""From the conditions of a sampling call to batch entries; a ValueError names a bad condition.

Arguments have the names of batch keys, except `prompts` (key tokens) and `class_labels` (key
class_label). A condition has either a single example, which applies to all, or all examples.
"""

import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array
from latent_diffusion.data.layout import LayoutTokens, Object
from latent_diffusion.nets.conditioners import Conditioner

ARGUMENTS = {"tokens": "prompts", "class_label": "class_labels"}  # others are equal


def argument(key: str) -> str:
    """The name of a batch key's argument."""
    return ARGUMENTS.get(key, key)


def check_names(conditioner: Conditioner, given: Mapping[str, Any]) -> None:
    """Raise ValueError if a condition is missing, or if the model has no such condition."""
    needed = [argument(key) for key in conditioner.keys]
    for name in needed:
        if given.get(name) is None:
            key = next(key for key in conditioner.keys if argument(key) == name)
            raise ValueError(f"this model is conditioned on {key}: give {name}")
    accepted = [*needed, *(argument(key) for key in conditioner.optional)]
    for name, value in given.items():
        if value is not None and name not in accepted:
            takes = ", ".join(accepted) or "no condition"
            raise ValueError(f"{name} given, but this model takes {takes}")


def size_of(given: Mapping[str, Any], f: int) -> tuple[int, int] | None:
    """Height and width of the picture that arguments imply, or None.

    given: conditions, `z_T`, and `known`, the picture to start from. f: pixels per latent position
    along each side.
    """
    sized = (("segmentation", 1), ("mask", 1), ("low_res", f), ("z_T", f), ("known", 1))
    for name, factor in sized:
        if given.get(name) is not None:
            shape = np.shape(given[name])
            where = -2 if name == "segmentation" else -3
            if len(shape) >= -where:
                return shape[where] * factor, shape[where + 1] * factor
    return None


def batch_of(
    conditioner: Conditioner,
    tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]],
    given: Mapping[str, Any],
    size: tuple[int, int],
    latent_size: tuple[int, int],
    channels: int = 3,
) -> dict[str, np.ndarray]:
    """The batch entries [N ...] that a conditioner reads.

    given: conditions by name. tokenize: turns prompts into `tokens` and so on. size, latent_size:
    (height, width) of the picture and of its latent. channels: of the picture. Raises
    ValueError for conditions that the model doesn't have or can't read, and for missing ones.
    """
    given = _with_defaults(conditioner, given, size)
    check_names(conditioner, given)
    parts = {
        key: part
        for part in conditioner.parts()
        for key in (*part.keys, *getattr(part, "optional", ()))
    }
    if "noise_level" in conditioner.optional and given.get("noise_level") is None:
        given["noise_level"] = parts["noise_level"].usual_level
    batch: dict[str, np.ndarray] = {}
    for key, part in parts.items():
        value = given[argument(key)]
        if key == "tokens":
            batch |= tokenize(texts("prompts", value))
        else:
            batch[key] = _READERS[key](part, value, (*size, channels), latent_size)
    return _of_one_length(batch)


def _with_defaults(
    conditioner: Conditioner, given: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    """The conditions, completed by the defaults of conditioners."""
    values = dict(given)
    for part in conditioner.parts():
        if hasattr(part, "defaults"):
            defaults = part.defaults(size)
            values |= {key: value for key, value in defaults.items() if values.get(key) is None}
    return values


def _of_one_length(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    lengths = {argument(key): len(value) for key, value in batch.items()}
    longest = max(lengths.values(), default=1)
    if wrong := [name for name, n in lengths.items() if n not in (1, longest)]:
        most = next(name for name, n in lengths.items() if n == longest)
        raise ValueError(f"{lengths[wrong[0]]} {wrong[0]} for {longest} {most}")
    return {key: np.repeat(value, longest // len(value), 0) for key, value in batch.items()}


def labels(name: str, value: Any, end: int) -> np.ndarray:
    """Integers [N] in [0, end) from one or several; ValueError for anything else."""
    return _integers(name, _of_shape(name, np.atleast_1d(value), ()), end)


def _integers(name: str, value: np.ndarray, end: int) -> np.ndarray:
    if value.dtype.kind not in "iu":
        raise ValueError(f"{name}: got {value.dtype}, expected integers")
    if value.size and not 0 <= value.min() <= value.max() < end:
        wrong = value.min() if value.min() < 0 else value.max()
        raise ValueError(f"{name}: {wrong} must lie in [0, {end})")
    return value.astype(np.int32)


def numbers(
    name: str,
    value: Any,
    shape: tuple[int | None, ...],
    low: float | int = -np.inf,
    high: float | int = np.inf,
) -> np.ndarray:
    """The value [N …] as float32; ValueError for another shape, or numbers outside the range."""
    value = np.asarray(value, np.float32)
    value = _of_shape(name, value[None] if value.ndim == len(shape) else value, shape)
    if value.size and not (value.min() >= low and value.max() <= high):  # NaN fails too
        raise ValueError(
            f"{name}: values in [{value.min():g}, {value.max():g}], expected [{low:g}, {high:g}]"
        )
    return value


def _of_shape(name: str, value: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    fits = value.ndim == len(shape) + 1 and all(
        want in (None, got) for want, got in zip(shape, value.shape[1:], strict=True)
    )
    if not fits or not len(value):
        expected = " ".join(["N", *("any" if n is None else str(n) for n in shape)])
        raise ValueError(f"{name} has shape {value.shape}, expected [{expected}]")
    return value


def _layout(part: Any, value: Any) -> np.ndarray:
    """Tokens [N L] from tokens, or from objects (label, box) of one example or of a list."""
    if isinstance(value, np.ndarray):
        value = value[None] if value.ndim == 1 else value
        value = _of_shape("layout", value, (part.max_length,))
        return _integers("layout", value, part.vocab_size)
    if not isinstance(value, Sequence) or not value:
        raise _no_layout(value)
    first = value[0]
    single = isinstance(first, Sequence) and first and not isinstance(first[0], Sequence)
    centres, crop = getattr(part, "centres", False), getattr(part, "encode_crop", None)
    crop = part.max_length % 3 == 2 if crop is None else crop
    size, rest = divmod(part.max_length - 2 * crop, 2 if centres else 3)
    if rest:
        raise ValueError(f"layout: max_length={part.max_length} isn't 3·n or 3·n + 2; give tokens")
    tokens = LayoutTokens(part.vocab_size, size, crop, centres)
    examples = [_objects(example) for example in ([value] if single else value)]
    if (most := max(map(len, examples))) > size:
        raise ValueError(f"layout: {most} objects, but this model takes {size} at most")
    return np.stack([tokens.build(objects) for objects in examples])


def _objects(example: Any) -> list[Object]:
    if not isinstance(example, Sequence):
        raise _no_layout(example)
    objects = []
    for entry in example:
        try:
            label, box = entry
            label, (left, top, right, bottom) = operator.index(label), map(float, box)
        except (TypeError, ValueError, OverflowError):
            raise _no_layout(entry) from None
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"layout: box {(left, top, right, bottom)} must have 0 ≤ left < right ≤ 1 and "
                "0 ≤ top < bottom ≤ 1"
            )
        objects.append(Object(label, (left, top, right, bottom)))
    return objects


def _no_layout(value: Any) -> ValueError:
    return ValueError(f"layout: {reprlib.repr(value)}: write (class, (left, top, right, bottom))")


def _segmentation(part: Any, value: Any, size: tuple[int, int]) -> np.ndarray:
    maps = np.asarray(value)
    maps = _of_shape("segmentation", maps[None] if maps.ndim == 2 else maps, size)
    maps = _integers("segmentation", maps, 2**31)
    if hasattr(part, "unread_square") and (unread := part.unread_square(maps)):
        raise ValueError(
            f"segmentation: {unread}; this model's classes are numbers below {part.num_classes}"
        )
    return maps


def _image(part: Any, value: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture with holes has the shape of the result; one that is varied is RGB of any size."""
    if "mask" not in part.keys:
        return numbers("image", value, (None, None, 3), -1, 1)
    return numbers("image", in_channels(np.asarray(value, np.float32), shape[2]), shape, -1, 1)


def _pixels(name: str, value: Any, low: int) -> np.ndarray:
    """(height, width) or (top, left), [N 2], for one picture or for each."""
    value = np.asarray(value)
    value = _of_shape(name, value[None] if value.ndim == 1 else value, (2,))
    if value.size and value.min() < low:
        raise ValueError(f"{name}: {value.min()} pixels, expected at least {low}")
    return _integers(name, value, 2**24)  # float32 has such integers exactly


# batch key -> function (conditioner, value, (H, W, C) of the picture, size of the latent) -> entry
_READERS: dict[str, Callable[[Any, Any, Any, Any], np.ndarray]] = {
    "class_label": lambda part, x, *_: labels(
        "class_labels", x, part.num_classes + (getattr(part, "null", 0) is not None)
    ),
    "layout": lambda part, x, *_: _layout(part, x),
    "segmentation": lambda part, x, shape, _: _segmentation(part, x, shape[:2]),
    "image": lambda part, x, shape, _: _image(part, x, shape),
    "mask": lambda part, x, shape, _: numbers("mask", x, (*shape[:2], 1), 0, 1),
    "low_res": lambda part, x, _, latent: numbers("low_res", x, (*latent, 3), -1, 1),
    "noise_level": lambda part, x, *_: labels("noise_level", x, part.end_of_levels),
    "depth": lambda part, x, *_: numbers("depth", x, (None, None, 1)),
    "neighbours": lambda part, x, *_: numbers("neighbours", x, (None, part.width)),
    "image_embedding": lambda part, x, *_: numbers("image_embedding", x, (part.width,)),
    "original_size": lambda part, x, *_: _pixels("original_size", x, 1),
    "crop_top_left": lambda part, x, *_: _pixels("crop_top_left", x, 0),
    "target_size": lambda part, x, *_: _pixels("target_size", x, 1),
    "aesthetic_score": lambda part, x, *_: numbers("aesthetic_score", x, ()),
}


def negative_sizes(
    conditioner: Conditioner, given: Mapping[str, Any], count: int
) -> dict[str, np.ndarray]:
    """The sizes of the unconditional, [1 …] or [count …], with the prefix "negative_".

    given: by the names of sizes; None takes the condition's. Raises ValueError as `batch_of`.
    """
    part = next((part for part in conditioner.parts() if hasattr(part, "opposites")), None)
    entries = {} if part is None else dict(part.opposites)
    entries |= {key: value for key, value in given.items() if value is not None}
    rows = {}
    for key, value in entries.items():
        name = f"negative_{key}"
        if part is None or key not in part.keys:
            raise ValueError(f"{name} given, but this model has no {key}")
        rows[name] = _READERS[key](part, value, None, None)
        if len(rows[name]) not in (1, count):
            raise ValueError(f"{len(rows[name])} of {name} for {count} prompts")
    return rows


def check_start(conditioner: Conditioner, image: Any, z_T: Any) -> None:
    """Raise ValueError if a refiner, which only finishes pictures, has no picture to start from."""
    refines = any(getattr(part, "aesthetic_score", False) for part in conditioner.parts())
    if refines and image is None and z_T is None:
        raise ValueError("this model is a refiner: give image with strength, or z_T of its base")


def in_range(images: Array | np.ndarray, name: str = "images") -> jax.Array:
    """The images; ValueError unless their range is [-1, 1]. Under jit only the dtype is checked.

    Reconstructions slightly exceed the range, so up to 2 is allowed. name: of the argument.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"{name}: dtype {images.dtype}, expected floats in [-1, 1]: x / 127.5 - 1")
    images = jnp.asarray(images)
    if isinstance(images, jax.core.Tracer) or images.size == 0:
        return images
    reach = float(jnp.max(jnp.abs(images)))
    if not reach <= 2:  # NaN fails too
        raise ValueError(f"{name}: values up to {reach:g}, expected [-1, 1]: x / 127.5 - 1")
    return images


def in_channels(images: Any, channels: int) -> Any:
    """The images [… C]; for a first stage of one channel, RGB becomes its brightness (BT.601)."""
    if channels != 1 or images.ndim < 3 or images.shape[-1] != 3:
        return images
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    return red + 0.587 * (green - red) + 0.114 * (blue - red)  # grey stays exactly as it is


def known_image(
    image: Array | np.ndarray | None,
    mask: Array | np.ndarray | None,
    varied: bool,
    shape: tuple[int, int, int],
    total: int,
) -> dict[str, np.ndarray]:
    """The batch entries of image-to-image and inpainting: "known" and "hole", [total H W C].

    varied: whether sampling starts from the image. shape: (H, W, C) of the image.
    """
    if image is None and mask is not None:
        raise ValueError("mask says where an image is made anew: give image, too")
    if image is None:
        return {}
    if mask is None and not varied:
        raise ValueError("image needs strength (image-to-image) or mask (inpainting)")
    image = in_channels(np.asarray(image, np.float32), shape[2])
    entries = {"image": numbers("image", image, shape, -1, 1)}
    if mask is not None:
        entries["mask"] = numbers("mask", mask, (*shape[:2], 1), 0, 1)
    names = {"image": "known", "mask": "hole"}
    return {names[name]: value for name, value in for_all(entries, total).items()}


def for_all(entries: Mapping[str, np.ndarray], total: int) -> dict[str, np.ndarray]:
    """Entries [total ...] from entries for a single image or for all; ValueError for others."""
    for name, value in entries.items():
        if len(value) not in (1, total):
            raise ValueError(
                f"{len(value)} of {name} for {total} images; give one, or one for each"
            )
    return {name: np.repeat(value, total // len(value), 0) for name, value in entries.items()}


def texts(name: str, value: str | Sequence[str]) -> list[str]:
    """One text or several as a list; ValueError for anything else."""
    several = list(value) if isinstance(value, Iterable) else []
    values = [value] if isinstance(value, str) else several
    if not values or not all(isinstance(text, str) for text in values):
        raise ValueError(f"{name}={value!r} must be a text, or a list of texts")
    return values


def size_in_pixels(name: str, value: Any) -> tuple[int, int]:
    """(height, width) from two whole numbers; ValueError for anything else."""
    try:
        height, width = map(operator.index, value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={reprlib.repr(value)} must be (height, width), whole numbers of pixels"
        ) from None
    return height, width


def array(name: str, value: Array | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value as an array; ValueError if it has another shape."""
    if np.shape(value) != shape:
        raise ValueError(f"{name} has shape {np.shape(value)}, expected {shape}")
    return np.asarray(value, np.float32)


def repeated(batch: Mapping[str, np.ndarray], num_images: int) -> dict[str, np.ndarray]:
    """Each example num_images times in turn, and the index of every image."""
    if num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    total = num_images * len(next(iter(batch.values()), np.zeros(1)))
    entries = {key: np.repeat(value, num_images, 0) for key, value in batch.items()}
    return {**entries, "index": np.arange(total, dtype=np.int32)}
