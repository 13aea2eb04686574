"""A folder of pictures (see `data.pictures`), with or without captions and classes.

Pictures are searched for recursively. Captions and other facts come from files beside them (see
`data.captions`); classes also from the first level of sub-folders, sorted by name, if every picture
lies in one.

Splits are the sub-folders train/, test/ and val/, if there are any. Otherwise the split "test" is a
share `test_fraction` of the files, by a hash of their paths, "train" the others, and "all" both.
"""

import hashlib
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from latent_diffusion.data.captions import describe
from latent_diffusion.data.pictures import (
    SUFFIXES,
    files,
    is_picture,
    read_depth,
    read_image,
    read_levels,
    read_mask,
)
from latent_diffusion.data.sources import Example, Remember, flat

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = ("train", "test", "val")
# Pictures that would be missed silently, because Pillow or this reader doesn't read them.
_UNREAD = sorted({*Image.EXTENSION, ".avif", ".heic", ".heif", ".jxl", ".webp"} - SUFFIXES)
_MAPS = {"mask": read_mask, "depth": read_depth, "segmentation": read_levels}


def _class_folders(root: Path, paths: list[Path]) -> tuple[str, ...]:
    """The sub-folders that hold the pictures; none if a picture lies outside of sub-folders."""
    parts = [path.relative_to(root).parts for path in paths]
    return () if any(len(p) == 1 for p in parts) else tuple(sorted({p[0] for p in parts}))


def _is_test(path: Path, root: Path, fraction: float) -> bool:
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


class ImageFolderSource:
    """Pictures `paths`, each with its annotation (caption, class, files of its maps).

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
            path, entry = self.paths[at], self.annotations[at]
            try:
                maps = {key: read(entry[key]) for key, read in _MAPS.items() if key in entry}
                return {"name": path.name, **entry, "image": read_image(path), **maps}
            except ValueError as error:
                if path not in self.unreadable:
                    self.unreadable.add(path)
                    logger.warning("skipping %s: %s", path, error)
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
    root = root.resolve()
    every = files(root)
    folders = [name for name in SPLIT_FOLDERS if (root / name).is_dir()]
    known = folders or ["all", "test", "train"]
    if split not in known:
        raise ValueError(
            f"unknown split {split!r} of {root}; known: {', '.join(known)} "
            "(data.train_split, data.test_split)"
        )
    base = root / split if folders else root
    inside = [path for path in every if path.is_relative_to(base)]
    paths = [path for path in inside if is_picture(path)]
    others = Counter(path.suffix.lower() for path in inside if not is_picture(path))
    unread = ", ".join(f"{others[suffix]} {suffix}" for suffix in _UNREAD if others[suffix])
    if not paths:
        found = f"; it has {unread}, which isn't read" if unread else ""
        raise ValueError(f"no images in {base} ({' '.join(sorted(SUFFIXES))}){found}")
    if unread:
        logger.warning("%s: these files aren't read: %s", base, unread)
    examples = describe(paths, inside, data_config.get("caption_column", ""))
    class_names = _class_folders(base, [*examples])
    for name in folders:
        there = [path for path in every if is_picture(path) and path.is_relative_to(root / name)]
        theirs = _class_folders(root / name, there)
        class_names = tuple(sorted({*class_names, *theirs})) if class_names and theirs else ()
    if class_names and not any("class_label" in entry for entry in examples.values()):
        for path, entry in examples.items():
            entry["class_label"] = class_names.index(path.relative_to(base).parts[0])
    if not folders and split != "all":
        share, wanted = data_config.test_fraction, split == "test"
        examples = {p: e for p, e in examples.items() if _is_test(p, root, share) == wanted}
    if not examples:
        raise ValueError(
            f"none of the {len(paths)} images in {root} belongs to split {split!r}, to which "
            f"data.test_fraction={share} gives a share by chance: add images, change the share, "
            "make folders train/ and test/, or set data.train_split and data.test_split to 'all'"
        )
    return Remember(ImageFolderSource([*examples], [*examples.values()], class_names))
