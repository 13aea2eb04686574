"""Sets of pictures to score: a folder, an ADM-style `.npz`, or a prepared TFDS data set."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from latent_diffusion.data import pictures, tfds
from latent_diffusion.data.windows import resize
from latent_diffusion.files.arrays import open_npz

GRID = "grid.png"  # sample.py writes it beside the samples


@dataclass(frozen=True)
class ImageSet:
    """`count` pictures of equal size; read(start, stop) returns them as uint8 [n H W 3].

    captions(n): the captions of the first n pictures; None without captions. version: tells files
    from others of the same names (see `version_of`); "" for pictures that aren't files.
    """

    name: str
    count: int
    read: Callable[[int, int], np.ndarray]
    captions: Callable[[int], list[str]] | None = None
    version: str = ""


def version_of(paths: Iterable[Path]) -> str:
    """A hash of the places, sizes and times of some files; "" without files."""
    found = []
    for path in paths:
        try:
            status = path.stat()
            found.append((str(path.absolute()), status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((str(path.absolute()), 0, 0))  # a link to nowhere
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""


def open_images(spec: str, image_size: int = 0) -> ImageSet:
    """Open a folder, an .npz with `arr_0`, or "tfds:NAME[/CONFIG][@SPLIT]" (split: train).

    image_size: crop every picture to its middle square and resize it to this side; 0 doesn't change
    pictures, which must then have equal sizes. Raises ValueError if there is nothing to score.
    """
    if spec.startswith("tfds:"):
        return _open_tfds(spec, image_size)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, image_size)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, image_size)
    raise ValueError(f"{spec!r} is neither a folder, an .npz file nor tfds:NAME")


def _square(image: np.ndarray, size: int) -> np.ndarray:
    if not size:
        return image
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return resize(image[top : top + side, left : left + side], size, size)


def _stacked(named: list[tuple[str, np.ndarray]], image_size: int) -> np.ndarray:
    images = [(name, _square(np.asarray(image), image_size)) for name, image in named]
    first, shape = images[0][0], images[0][1].shape
    for name, image in images:
        if image.shape != shape:
            sizes = [f"{i.shape[1]}×{i.shape[0]}" for i in (images[0][1], image)]
            raise ValueError(
                f"mixed image sizes: {first} is {sizes[0]}, {name} is {sizes[1]}; bring them to "
                "one with --image_size"
            )
    return np.stack([image for _, image in images])


def _open_folder(folder: Path, image_size: int) -> ImageSet:
    paths = [path for path in pictures.files(folder) if pictures.is_picture(path)]
    paths = sorted((path for path in paths if path.name != GRID), key=_by_number)
    if not paths:
        raise ValueError(f"{folder} holds no images ({' '.join(sorted(pictures.SUFFIXES))})")
    if not image_size:
        _check_sizes(paths, folder)

    def read(start: int, stop: int) -> np.ndarray:
        try:
            named = [(path.name, pictures.read_image(path)) for path in paths[start:stop]]
        except ValueError as error:
            raise _unreadable(paths, folder, error) from None
        return _stacked(named, image_size)

    return ImageSet(str(folder), len(paths), read, version=version_of(paths))


def _by_number(path: Path) -> tuple[str, int, str]:
    """A key that puts 100000.png, which `sample.py` writes, after 99999.png."""
    return str(path.parent), len(path.stem) * path.stem.isdigit(), path.name


def _check_sizes(paths: list[Path], folder: Path) -> None:
    """Compare the sizes in the files' headers before the work begins."""
    examples: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            examples.setdefault(pictures.size_of(path), path)
        except ValueError as error:
            raise _unreadable(paths, folder, error) from None
        if len(examples) > 1:
            (a, first), (b, other) = examples.items()
            raise ValueError(
                f"mixed image sizes in {folder}: {first.name} is {a[1]}×{a[0]}, {other.name} is "
                f"{b[1]}×{b[0]}; bring them to one with --image_size"
            )


def _unreadable(paths: list[Path], folder: Path, error: ValueError) -> ValueError:
    """The error for a folder with damaged files: it counts them, and names the first."""
    bad = []
    for path in paths:
        try:
            pictures.read_image(path)
        except ValueError:
            bad.append(path.name)
    shown = ", ".join(bad[:5]) + (" …" if len(bad) > 5 else "")
    return ValueError(
        f"{len(bad)} of {len(paths)} images in {folder} can't be read: {shown} ({error})"
    )


def _open_npz(path: Path, image_size: int) -> ImageSet:
    with open_npz(path) as file:
        images = file.get("arr_0")
        names = ", ".join(file.files)
    if images is None:
        raise ValueError(f"{path} holds no images: no arr_0 among {names or 'nothing'}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(
            f"{path}: arr_0 must be uint8 [N H W 3], got {images.dtype} {list(images.shape)}"
        )

    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([_square(image, image_size) for image in images[start:stop]])

    return ImageSet(str(path), len(images), read, version=version_of([path]))


def _open_tfds(spec: str, image_size: int) -> ImageSet:
    name, _, split = spec.partition("@")
    fields = ConfigDict({"name": name, "dir": None, "features": {}})
    source: Any = tfds.make(fields, split or "train").source

    def read(start: int, stop: int) -> np.ndarray:
        named = [(f"{spec}[{i}]", source[i]["image"]) for i in range(start, stop)]
        return _stacked(named, image_size)

    return ImageSet(spec, len(source), read)
