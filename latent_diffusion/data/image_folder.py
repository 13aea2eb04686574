"""A folder of pictures (see `data.pictures`), with or without captions and classes.

Pictures are searched for recursively. Captions and other annotations come from files beside them
(see `data.captions`). If every picture lies in a sub-folder, the first level of sub-folders, sorted
by name, are the classes, unless annotations have classes.

Splits are the sub-folders train/, test/ and val/, if any of them exists, each with files of
annotations for its own pictures. Otherwise the split "test"
is a share `test_fraction` of the files, chosen by a hash of their paths, "train" is the rest, and
"all" is both.
"""

import hashlib
import itertools
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize
from PIL import Image

from latent_diffusion.data.captions import FILES, MAPS, describe, maps_of
from latent_diffusion.data.folders import encoded
from latent_diffusion.data.index_files import remembered
from latent_diffusion.data.pictures import (
    READ_MAPS,
    SUFFIXES,
    file_names,
    is_picture,
    read_image,
    size_of,
)
from latent_diffusion.data.sources import Example, Readable, Remember, check_split, flat

logger = logging.getLogger(__name__)

FORMAT = 3  # of the index; another number when its content changes
LARGE = 10_000  # files; the index of a larger folder is stored until a file changes
SPLIT_FOLDERS = ("train", "test", "val")
# Suffixes of pictures that Pillow or this reader doesn't read; a warning names them.
_UNREAD = sorted({*Image.EXTENSION, ".avif", ".heic", ".heif", ".jxl", ".webp"} - SUFFIXES)


def _class_folders(root: Path, paths: list[Path]) -> tuple[str, ...]:
    """The sub-folders that hold the pictures; none if a picture lies outside of sub-folders."""
    parts = [path.relative_to(root).parts for path in paths]
    return () if any(len(p) == 1 for p in parts) else tuple(sorted({p[0] for p in parts}))


def _is_test(path: Path, root: Path, fraction: float) -> bool:
    digest = hashlib.sha256(encoded(path.relative_to(root).as_posix())).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


class ImageFolderSource(Readable):
    """Pictures `paths`, each with its annotation (caption, class, files of its maps)."""

    def __init__(
        self, paths: list[Path], annotations: list[Example], class_names: tuple[str, ...] = ()
    ):
        super().__init__(len(paths))
        self.paths, self.annotations, self.class_names = paths, annotations, class_names

    def captions(self) -> list[str]:
        """All captions, in order; no image is opened."""
        return flat([entry.get("caption", "") for entry in self.annotations])

    def label_of(self, index: int) -> int:
        """The class of a picture, which isn't opened."""
        label: int = self.annotations[index]["class_label"]
        return label

    @property
    def num_classes(self) -> int:
        """One more than the largest class."""
        return 1 + max(
            (int(entry.get("class_label", -1)) for entry in self.annotations), default=-1
        )

    def shapes(self) -> np.ndarray:
        """Height and width [N 2] of the pictures, from their headers."""
        return self.sizes(lambda index: size_of(self.paths[index]))

    def name_of(self, index: int) -> Path:
        """The file of a picture."""
        return self.paths[index]

    def read(self, index: int) -> Example:
        """Example number `index`. Raises ValueError where a file can't be read."""
        path, entry = self.paths[index], self.annotations[index]
        maps = {key: read(entry[key]) for key, read in READ_MAPS.items() if key in entry}
        return {"name": path.name, **entry, "image": read_image(path), **maps}


def make(data_config: Any, split: str) -> Remember:
    """Read a split of the folder `data_config.dir`; see the module's docstring for its files.

    Raises ValueError for a folder, a split or a file of annotations that is missing or wrong.
    """
    if not data_config.dir:
        raise ValueError("data.name='image_folder' needs data.dir, the folder of pictures")
    root = Path(data_config.dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.dir: no folder {str(root)!r}")
    root = root.resolve()
    names = file_names(root)
    if len(names) <= LARGE:
        return Remember(_read(root, data_config, split, sorted(map(Path, names))))
    fields = [
        f"{FORMAT} {data_config.get('caption_column', '')} {data_config.test_fraction} {root}"
    ]
    state = itertools.chain(fields, map(_stamp, sorted(names)))
    index = remembered(
        *("image_folder", f"{root} {split}", state),
        lambda: _packed(_read(root, data_config, split, sorted(map(Path, names)))),
    )
    return Remember(_unpacked(index))


def _stamp(name: str) -> str:
    try:
        status = os.stat(name)
    except OSError:  # a link to nowhere; reading it is an error of its own
        return f"{name} is absent"
    return f"{name} {status.st_size} {status.st_mtime_ns}"


def _packed(source: ImageFolderSource) -> dict[str, np.ndarray]:
    """A source as arrays, for a file. Names are bytes, since not all of them are UTF-8."""
    code = os.fsencode
    entries = [{k: code(v) if k in MAPS else v for k, v in e.items()} for e in source.annotations]
    tree = {"paths": [code(path) for path in source.paths], "entries": entries}
    tree |= {"class_names": [code(name) for name in source.class_names]}
    return {"packed": np.frombuffer(msgpack_serialize(tree, in_place=True), np.uint8)}


def _unpacked(index: dict[str, np.ndarray]) -> ImageFolderSource:
    tree = msgpack_restore(index["packed"].tobytes())
    for entry in tree["entries"]:
        entry.update({key: Path(os.fsdecode(entry[key])) for key in MAPS if key in entry})
    paths, class_names = (map(os.fsdecode, tree[key]) for key in ("paths", "class_names"))
    return ImageFolderSource([*map(Path, paths)], tree["entries"], tuple(class_names))


def _read(root: Path, data_config: Any, split: str, every: list[Path]) -> ImageFolderSource:
    """The split of a folder. every: all files of the folder."""
    folders = [name for name in SPLIT_FOLDERS if (root / name).is_dir()]
    check_split(split, folders, root)
    base = root / split if folders else root
    inside = [path for path in every if path.is_relative_to(base)]
    paths = [path for path in inside if is_picture(path)]
    others = Counter(path.suffix.lower() for path in inside if not is_picture(path))
    unread = ", ".join(f"{others[suffix]} {suffix}" for suffix in _UNREAD if others[suffix])
    if not paths:
        hint = f"; it has {unread}, which isn't read" if unread else ""
        raise ValueError(f"no images in {base} ({' '.join(sorted(SUFFIXES))}){hint}")
    if unread:
        logger.warning("%s: these files aren't read: %s", base, unread)
    for path in (root / name for name in FILES if folders):
        if path.is_file():
            logger.warning("%s isn't read: annotations lie in train/, test/ or val/", path)
    examples = describe(paths, inside, data_config.get("caption_column", ""))
    class_names = _class_folders(base, [*examples])
    for name in folders if class_names else ():
        files = [path for path in every if path.is_relative_to(root / name)]
        maps = maps_of(files)
        pictures = [path for path in files if is_picture(path) and path not in maps]
        more = _class_folders(root / name, pictures)
        class_names = tuple(sorted({*class_names, *more})) if class_names and more else ()
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
    return ImageFolderSource([*examples], [*examples.values()], class_names)
