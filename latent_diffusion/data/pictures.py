"""Read pictures, for training, sampling and evaluation alike.

A picture is rotated by its EXIF data, transparent parts become white, 16 bits become 8, and grey,
palettes and CMYK become RGB. Of an animation the first frame is read.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8
from PIL import ExifTags, Image, ImageOps

Image.init()  # registers all formats of this Pillow, some of which need libraries
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF") if name in Image.OPEN
)
SUFFIXES = frozenset(
    suffix
    for suffix in (
        *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"),
    )
    if Image.EXTENSION.get(suffix) in FORMATS
)


Source = str | Path | io.BytesIO  # messages name it by its str()


def files(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted.

    Links to folders are followed, but no folder is read twice; files and folders whose names begin
    with a dot are left out. Raises ValueError for a folder that can't be listed.
    """
    return sorted(map(Path, file_names(folder)))


def file_names(folder: Path) -> list[str]:
    """The same files as texts and in any order, which takes a tenth of the time."""
    paths: list[str] = []
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} can't be listed: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link leads to this folder, too
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        links = {name for name in folders if os.path.islink(os.path.join(parent, name))}
        seen = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(seen, key=lambda name: (name in links, name))  # links come last
        paths += [f"{parent}{os.sep}{name}" for name in names if not name.startswith(".")]
    return paths


def is_picture(path: Path) -> bool:
    """Whether a file has the suffix of pictures that the installed Pillow can read."""
    return path.suffix.lower() in SUFFIXES


def read_image(path: Source) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in RGB. Raises a ValueError of one line for a file that can't be read."""
    return _read(path, _turned(_as_rgb))


def read_mask(path: Source) -> Float32[np.ndarray, "H W 1"]:
    """A mask, 1 in its holes: where the picture is white, or transparent if it has transparency.

    If all visible pixels of a picture with transparency are white, they are the hole instead.
    """
    return _read(path, _turned(_as_mask))


def read_transparency(path: Source) -> Float32[np.ndarray, "H W 1"]:
    """A mask, 1 in its holes: the transparent parts; of an opaque picture, as `read_mask`."""
    return _read(path, _turned(_as_transparency))


def is_transparent(path: Source) -> bool:
    """Whether parts of the picture are transparent."""
    return _read(path, lambda image: image.has_transparency_data and bool(_hidden(image).any()))


def read_levels(path: Source) -> Int32[np.ndarray, "H W"]:
    """The numbers in a picture, such as classes: levels of grey, or indices of a palette."""
    return _read(path, _turned(_as_levels))


def read_depth(path: Source) -> Float32[np.ndarray, "H W 1"]:
    """The levels of grey as they are stored, with 8, 16 or 32 bits."""
    return _read(path, _turned(_as_depth))


READ_MAPS = {"mask": read_mask, "depth": read_depth, "segmentation": read_levels}


def size_of(path: Source) -> tuple[int, int]:
    """Height and width of the picture as it would be read, from the file's header."""
    return _read(path, _size)


def stored_size(path: Source) -> tuple[int, int]:
    """Height and width of the picture before it is turned; nothing of it is decoded."""
    return _read(path, lambda file: file.size[::-1])


def _read(path: Source, decode: Callable[[Image.Image], Any]) -> Any:
    if not isinstance(path, io.BytesIO) and not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")  # also for pipes, whose reading may never end
    try:
        with Image.open(path, formats=FORMATS) as file:
            return decode(file)
    except Exception as error:  # decoders raise errors of all kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} can't be read as a picture: {reason}") from error


def _turned(decode: Callable[[Image.Image], np.ndarray]) -> Callable[[Image.Image], np.ndarray]:
    return lambda file: decode(ImageOps.exif_transpose(file))


def _size(file: Any) -> tuple[int, int]:
    header = file.format == "PNG" and _ends_with_pixels(file.fp)
    exif = Image.Image.getexif(file) if header else file.getexif()  # which decodes any PNG
    turns = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    if turns and file.format == "TIFF":  # which Pillow turns itself, at the latest when it decodes
        file.load()
        turns = False
    return file.size if turns else file.size[::-1]


def _ends_with_pixels(png: Any) -> bool:
    """Whether nothing, such as EXIF data, comes after the pixels of an open PNG file."""
    place, pixels, more, kind = png.tell(), False, False, b""
    png.seek(8)  # behind the signature
    while kind != b"IEND" and len(head := png.read(8)) == 8:
        kind = head[4:]
        more |= pixels and kind not in (b"IDAT", b"IEND")
        pixels |= kind == b"IDAT"
        png.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # its content and checksum
    png.seek(place)
    return not more


def _is_deep(image: Image.Image) -> bool:
    return image.mode[0] in "IF"  # numbers of 16 or 32 bits


def _grey(image: Image.Image) -> Float[np.ndarray, "H W"]:
    """Levels in 0 … 255."""
    if not _is_deep(image):
        return np.asarray(image.convert("L"), np.float64)
    levels = np.asarray(image, np.float64)
    if image.mode != "F":
        return np.clip(levels / 257, 0, 255)
    if not (levels.min() >= 0 and levels.max() <= 1):
        raise ValueError(f"floats in [{levels.min():g}, {levels.max():g}], expected [0, 1]")
    return 255 * levels


def _as_rgb(image: Image.Image) -> np.ndarray:
    if _is_deep(image):
        grey = np.where(_hidden(image), 255, np.round(_grey(image))).astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _hidden(image: Image.Image) -> Bool[np.ndarray, "H W"]:
    """The transparent pixels; with 16 bits, those of the level that the file names."""
    if _is_deep(image):
        return np.asarray(image) == image.info.get("transparency", -1)
    return np.asarray(image.convert("RGBA"))[..., 3] <= 127


def _as_mask(image: Image.Image) -> np.ndarray:
    hole = _grey(image) > 127
    if image.has_transparency_data:
        visible = ~_hidden(image)
        if not visible.all():
            white_alone = visible.any() and hole[visible].all()
            hole = visible if white_alone else ~visible
    return hole[..., None].astype(np.float32)


def _as_transparency(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        return _as_mask(image)
    return _hidden(image)[..., None].astype(np.float32)


def _as_levels(image: Image.Image) -> np.ndarray:
    if not (_is_deep(image) or image.mode in ("P", "L", "1")):
        rgb = np.asarray(image.convert("RGB"))
        if (rgb != rgb[..., :1]).any():
            raise ValueError("it has colours, but levels of grey or a palette stand for classes")
        return rgb[..., 0].astype(np.int32)
    return np.asarray(image).astype(np.int32)


def _as_depth(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image if _is_deep(image) else image.convert("L"))[..., None]
    if not np.isfinite(levels).all():
        raise ValueError("levels that aren't finite")
    return levels.astype(np.float32)
