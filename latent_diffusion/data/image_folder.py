"""A folder of pictures, with or without captions and classes.

Pictures are searched for recursively: PNG, JPEG, WebP, BMP, GIF (first frame). Their captions and
classes are read from

- `metadata.jsonl` (`{"file_name": ..., "text": ..., "class_label": 3}`, Hugging Face's convention),
- else `captions.txt` (`file<TAB>caption` or `file|caption`; a file may have several lines),
- else a text file of the same name beside the picture (`cat.png`, `cat.txt`);
- classes: from the first level of sub-folders, sorted by name, if every picture lies in one.

Splits are the sub-folders train/, test/ and val/, if there are any. Otherwise the split "test" is a
share `test_fraction` of the files, by a hash of their paths, "train" the others, and "all" both.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from latent_diffusion.data.sources import Example, Remember, flat

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
SPLIT_FOLDERS = ("train", "test", "val")


def read_image(path: Path) -> np.ndarray:
    """Read a picture as uint8 [H W 3]: rotated by its EXIF, transparency on white, grey as RGB."""
    with Image.open(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits of grey
            grey = np.asarray(image).astype(np.float64) / 257
            return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[..., None], 3, -1)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))


def _read_metadata(file: Path) -> dict[Path, Example]:
    rows = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = file.parent / row.pop("file_name")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{file}:{number}: expected a JSON object with file_name") from None
        if "text" in row:
            row["caption"] = row.pop("text")
        rows[path] = row
    return rows


def _read_captions(file: Path) -> dict[Path, Example]:
    captions: dict[Path, Example] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, separator, caption = line.partition("\t" if "\t" in line else "|")
        if not separator:
            raise ValueError(f"{file}:{number}: expected 'file<TAB>caption' or 'file|caption'")
        entry = captions.setdefault(file.parent / name.strip(), {"caption": []})
        entry["caption"].append(caption.strip())
    for entry in captions.values():
        if len(entry["caption"]) == 1:
            entry["caption"] = entry["caption"][0]
    return captions


def _annotations(root: Path, paths: list[Path]) -> list[Example]:
    """The caption and class of each picture; all pictures have the same keys."""
    described: dict[Path, Example] = {}
    for name, read in (("metadata.jsonl", _read_metadata), ("captions.txt", _read_captions)):
        for file in () if described else sorted(root.rglob(name)):
            described |= read(file)
    if described:
        missing = sorted(path for path in described if not path.is_file())
        if missing:
            logger.warning("%s: %d described files missing: %s", root, len(missing), missing[0])
    entries = []
    for path in paths:
        beside = path.with_suffix(".txt")
        if not described and beside.is_file():
            entries.append({"caption": beside.read_text(encoding="utf-8").strip()})
        else:
            entries.append(dict(described.get(path, {})))
    if any("caption" in entry for entry in entries):
        for entry in entries:
            entry.setdefault("caption", "")
    for key in {key for entry in entries for key in entry}:
        without = [p for p, entry in zip(paths, entries, strict=True) if key not in entry]
        if without:
            raise ValueError(f"{root}: {key} is given for some files but not for {without[0].name}")
    return entries


def _class_folders(root: Path, paths: list[Path]) -> tuple[str, ...]:
    """The sub-folders that hold the pictures; none if a picture lies outside of sub-folders."""
    parts = [path.relative_to(root).parts for path in paths]
    return () if any(len(p) == 1 for p in parts) else tuple(sorted({p[0] for p in parts}))


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _is_test(path: Path, root: Path, fraction: float) -> bool:
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


class ImageFolderSource:
    """Pictures `paths`, each with its annotation (caption, class).

    A file that can't be read is named once in the log, added to `unreadable`, and replaced by the
    next readable one, so that a bad file among a million doesn't end a run.
    """

    def __init__(
        self, paths: list[Path], annotations: list[Example], class_names: tuple[str, ...] = ()
    ):
        self.paths, self.annotations, self.class_names = paths, annotations, class_names
        self.unreadable: set[Path] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def captions(self) -> list[str]:
        """All captions, in order, without opening an image."""
        return flat([entry.get("caption", "") for entry in self.annotations])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            path = self.paths[at]
            try:
                image = read_image(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
                if path not in self.unreadable:
                    self.unreadable.add(path)
                    logger.warning("skipping unreadable image %s: %s", path, e)
                continue
            return {"image": image, "name": path.name, **self.annotations[at]}
        raise ValueError(f"none of the {len(self)} images can be read, e.g. {self.paths[0]}")


def make(data_config: Any, split: str) -> Remember:
    """Read a split of the folder `data_config.dir`; the module describes the files.

    Raises ValueError for a folder, a split or a description that is missing or wrong.
    """
    if not data_config.dir:
        raise ValueError("data.name='image_folder' needs data.dir, the folder of pictures")
    root = Path(data_config.dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.dir: no folder {str(root)!r}")
    folders = [name for name in SPLIT_FOLDERS if (root / name).is_dir()]
    if folders:
        if split not in folders:
            raise ValueError(f"unknown split {split!r} of {root}; known: {', '.join(folders)}")
        base = root / split
        paths = _images(base)
        classes = [_class_folders(root / name, _images(root / name)) for name in folders]
        class_names = tuple(sorted({c for names in classes for c in names})) if all(classes) else ()
    else:
        if split not in ("train", "test", "all"):
            raise ValueError(f"unknown split {split!r} of {root}; known: all, test, train")
        base, every = root, _images(root)
        class_names = _class_folders(root, every)
        fraction = data_config.test_fraction
        paths = [
            p for p in every if split == "all" or _is_test(p, root, fraction) == (split == "test")
        ]
    if not paths:
        raise ValueError(f"no images for split {split!r} in {base} ({' '.join(sorted(SUFFIXES))})")
    annotations = _annotations(base, paths)
    if class_names and "class_label" not in annotations[0]:
        for path, entry in zip(paths, annotations, strict=True):
            entry["class_label"] = class_names.index(path.relative_to(base).parts[0])
    return Remember(ImageFolderSource(paths, annotations, class_names))
