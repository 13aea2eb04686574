"""Tars of pictures as img2dataset and webdataset write them: indexed once, with random access.

The members KEY.jpg (or another format), KEY.txt, KEY.json and KEY.cls belong to one example: its
picture, its caption, an object of metadata, and its class. Of the metadata, `original_width` and
`original_height` are used, and `caption` if there is no KEY.txt. Tars may lie on any file system of
fsspec ("gs://…").

Splits are the sub-folders train/ and test/, if there are any. Otherwise "test" is a share
`test_fraction` of the examples, chosen by a hash of their keys, "train" is the rest, and "all" is
both.
"""

import functools
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from latent_diffusion.data.folders import encoded, file_system, visible_files
from latent_diffusion.data.index_files import Arrays, remembered
from latent_diffusion.data.pictures import SUFFIXES, read_image, size_of
from latent_diffusion.data.sources import Example, Readable, check_caption, check_split

logger = logging.getLogger(__name__)

FORMAT = 2  # of the index; another number when its content changes
PARTS = ("image", "txt", "json", "cls")  # parts of an example, each a member of the tar


class TarSource(Readable):
    """Examples by the places of their members. An example that can't be read is skipped.

    index: `tar` [N], the number of the tar, and for each part `NAME_start` and `NAME_size` [N] in
    bytes; the size is 0 for an absent part.
    """

    def __init__(self, system: Any, tars: list[str], index: Arrays):
        super().__init__(len(index["tar"]))
        self.system, self.tars, self._index = system, tars, index
        self._has_classes = bool(index["cls_size"].any())

    def name_of(self, index: int) -> str:
        """The tar, and the picture's position in it."""
        return f"{self.tars[self._index['tar'][index]]}@{self._index['image_start'][index]}"

    def read(self, index: int) -> Example:
        """Example number `index`. Raises ValueError where it can't be read."""
        example = {"name": self.name_of(index), **self._facts(index)}
        return {**example, "image": read_image(io.BytesIO(self._bytes(index, "image")))}

    def captions(self) -> list[str]:
        """All captions, in order; pictures aren't read."""
        return self.texts(lambda i: self._facts(i).get("caption", ""))

    def shapes(self) -> np.ndarray:
        """Height and width [N 2] of the pictures, from their headers."""
        return self.sizes(lambda i: size_of(io.BytesIO(self._bytes(i, "image"))))

    @functools.cached_property
    def _has_captions(self) -> bool:
        """Whether there are texts, or a few examples, evenly over the tars, have a caption."""
        few = np.linspace(0, len(self) - 1, 16).astype(int).tolist()
        return bool(self._index["txt_size"].any()) or any(map(self._caption, few))

    def _caption(self, index: int) -> str | list[str]:
        try:
            return self._texts(index)[0]
        except ValueError:
            return ""

    def _texts(self, index: int) -> tuple[str | list[str], Example]:
        """The caption of an example, and the object of its .json."""
        facts = json.loads(self._bytes(index, "json") or b"{}")
        if not isinstance(facts, dict):
            raise ValueError("its .json is no object")
        text = self._bytes(index, "txt").decode("utf-8-sig").strip()
        return check_caption(text or facts.get("caption") or ""), facts

    def _facts(self, index: int) -> Example:
        caption, facts = self._texts(index)
        example: Example = {"caption": caption} if caption or self._has_captions else {}
        if self._has_classes:
            example["class_label"] = int(self._bytes(index, "cls"))
        original = facts.get("original_height"), facts.get("original_width")
        if all(isinstance(side, int) for side in original):
            example["original_size"] = np.array(original)
        return example

    def _bytes(self, index: int, part: str) -> bytes:
        start, size = (int(self._index[f"{part}_{what}"][index]) for what in ("start", "size"))
        if not size:
            return b""
        tar = self.tars[self._index["tar"][index]]
        data: bytes = self.system.cat_file(tar, start=start, end=start + size)
        return data


def _examples(file: Any) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The key of each example of a tar, and the places of its members.

    Raises tarfile.ReadError where the tar is cut short; its last example, which may lack members,
    is left out then.
    """
    key, parts = "", dict[str, tuple[int, int]]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else all stay in memory
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            part = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
            if not member.isfile() or part not in PARTS:
                continue
            if f"{folder}/{stem}" != key:
                if "image" in parts:
                    yield key, parts
                key, parts = f"{folder}/{stem}", {}
            parts[part] = (member.offset_data, member.size)
        file.seek(tar.offset)  # where `tarfile` sees the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the block of zeros at its end is missing")
    if "image" in parts:
        yield key, parts


def _index(system: Any, tars: list[str]) -> Arrays:
    """Make the index from the headers of all tars."""
    rows: list[tuple[int, ...]] = []
    hashes, broken = [], []
    for number, path in enumerate(tars):
        count = len(rows)
        try:
            with system.open(path, "rb") as file:
                for key, parts in _examples(file):
                    places = [place for part in PARTS for place in parts.get(part, (0, 0))]
                    rows.append((number, *places))
                    digest = hashlib.sha256(encoded(f"{path.rpartition('/')[2]}{key}")).digest()
                    hashes.append(int.from_bytes(digest[:8], "big"))
        except (tarfile.TarError, OSError, EOFError) as error:
            broken.append(f"{path}: {error}, after {len(rows) - count} examples")
    if broken:
        logger.warning("%d of %d tars are cut short: %s", len(broken), len(tars), broken[0])
    table = np.array(rows, np.int64).reshape(-1, 1 + 2 * len(PARTS))
    index: Arrays = {"tar": table[:, 0].astype(np.int32), "hash": np.array(hashes, np.uint64)}
    for i, part in enumerate(PARTS):
        index[f"{part}_start"] = table[:, 1 + 2 * i]
        index[f"{part}_size"] = table[:, 2 + 2 * i].astype(np.int32)
    return index


def make(data_config: Any, split: str) -> TarSource:
    """A split of the tars in `data_config.dir`. Raises ValueError where there are none."""
    if not data_config.dir:
        raise ValueError("data.name='tars' needs data.dir, the folder of tars")
    system, root = file_system(data_config.dir)
    tars = visible_files(system, root, ".tar")
    inside = {
        name: [p for p in tars if p.startswith(f"{root}/{name}/")] for name in ("train", "test")
    }
    folders = [name for name, paths in inside.items() if paths]
    if not tars:
        raise ValueError(f"data.dir={data_config.dir}: no .tar files in this folder")
    check_split(split, folders, root)
    paths = inside[split] if folders else list(tars)
    stamps = ("size", "mtime", "etag", "ETag", "LastModified", "updated")
    state = [str(FORMAT), *(f"{p} {[str(tars[p].get(key)) for key in stamps]}" for p in paths)]
    index = remembered(
        "tars", f"{root} {split if folders else ''}", state, lambda: _index(system, paths)
    )
    hashes = index.pop("hash")
    if not folders and split != "all":
        held_out = hashes / 2.0**64 < data_config.test_fraction
        index = {k: v[held_out == (split == "test")] for k, v in index.items()}
    if not len(index["tar"]):
        raise ValueError(f"none of the pictures in the tars of {root} belongs to split {split!r}")
    return TarSource(system, paths, index)
