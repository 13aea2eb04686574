"""Folders of shards: examples that `python -m latent_diffusion.encode` has cut and encoded.

    ROLE/index.json          how the examples were made, by which first stage, and the shards
    ROLE/00000.array_record  examples, one per record

A role is "train" or "test", whatever the splits of the data are called that were encoded for it.

A record has an example's values (`caption`, `class_label`, `original_size` ...) and `crops`. Each
crop has the arrays for one window of the picture and `mirrors`: the latents of the cut picture
and, where pictures are mirrored, those of its mirror image.
"""

import functools
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from latent_diffusion.data.folders import Folder
from latent_diffusion.data.sources import Example, flat
from latent_diffusion.files.reading import MAX_TEXT, read_json, reading

INDEX = "index.json"
MOST_OPEN = 512  # open shards at a time, each with a file descriptor
_OPTIONS = "readahead_buffer_size:0"  # examples are read one by one


class Shard(NamedTuple):
    """A file of examples. size: height and width of its pictures, if sizes differ by shard."""

    name: str
    examples: int
    bytes: int
    size: tuple[int, int] | None = None


def shard_name(number: int) -> str:
    """The name of the file of a shard."""
    return f"{number:05d}.array_record"


def write_shard(folder: Folder, name: str, examples: Iterable[Example]) -> None:
    """Write a file that appears when it is complete. Raises OSError where it can't be written."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with folder.whole(name) as partial:
        try:
            writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            for example in examples:
                writer.write(_packed(example))
            writer.close()
        except RuntimeError as error:  # the only exception of the writer
            raise OSError(f"{folder}/{name}: {str(error).partition(';')[0]}") from error


def _packed(example: Example) -> bytes:
    """The bytes of an example, with lists in the place of tuples."""
    crops = [{**crop, "window": list(crop["window"])} for crop in example["crops"]]
    size = {"size": list(example["size"])} if "size" in example else {}
    packed: bytes = msgpack_serialize({**example, **size, "crops": crops})
    return packed


def _unpacked(record: bytes) -> Example:
    example: Example = msgpack_restore(record)
    for crop in example["crops"]:
        crop["window"] = tuple(crop["window"])
    return {**example, "size": tuple(example["size"])} if "size" in example else example


def write_index(folder: Folder, made: Mapping[str, Any], shards: Iterable[Shard] | None) -> None:
    """Write the index. made: how the examples were made. shards: None until all are written."""
    listed = None if shards is None else [list(shard) for shard in shards]
    with folder.whole(INDEX) as path:
        path.write_text(json.dumps({**made, "shards": listed}, indent=1) + "\n", encoding="utf-8")


def read_index(folder: Folder) -> tuple[dict[str, Any], list[Shard] | None]:
    """How the examples of a folder were made, and its shards (None while they are written)."""
    with reading(f"{folder}/{INDEX}"), tempfile.TemporaryDirectory() as copies:
        folder.fetch(INDEX, path := Path(copies) / INDEX)
        made = read_json(path, MAX_TEXT)
        listed = made.pop("shards")
        if listed is None:
            return made, None
        shards = (Shard(*shard) for shard in listed)
        return made, [s._replace(size=(s.size[0], s.size[1])) if s.size else s for s in shards]


class ShardSource:
    """The examples of a folder of shards. `made` says how they were made.

    Raises a ValueError of one line where the folder isn't complete, or its files differ from the
    index. Open shards take 8 bytes of memory per example, and little else.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.made, shards = read_index(folder)
        if shards is None:
            there = len([name for name in folder.sizes() if name.endswith(".array_record")])
            raise ValueError(
                f"{folder} isn't complete: {there} of {self.made['num_shards']} shards are there; "
                "the command that began it goes on with it"
            )
        self.shards = shards
        _check_files(folder, shards)
        self._ends = np.cumsum([shard.examples for shard in shards])
        if self._ends[-1] != self.made["examples"]:
            raise ValueError(
                f"{folder}/{INDEX}: its shards have {self._ends[-1]} examples together, but it "
                f"counts {self.made['examples']}"
            )
        self._version = json.dumps([self.made, shards])
        self._reader = functools.lru_cache(MOST_OPEN)(self._open)

    def __reduce__(self) -> Any:
        return type(self), (self.folder,)  # each process opens the files anew

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        place = int(index) - int(self._ends[number] - self.shards[number].examples)
        with reading(f"{self.folder}/{self.shards[number].name}"):
            return _unpacked(self._reader(number).read(place, place + 1)[0])

    def shapes(self) -> np.ndarray:
        """Height and width [N 2] of the pictures that were encoded; each shard has one size."""
        sizes = [shard.size or (self.made["data"]["image_size"],) * 2 for shard in self.shards]
        return np.repeat(sizes, [shard.examples for shard in self.shards], axis=0)

    def captions(self) -> list[str]:
        """All captions, in order; every record is read for them."""
        return flat([self[i].get("caption", "") for i in range(len(self))])

    def _open(self, number: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        shard = self.shards[number]
        path = self.folder.local(shard.name, self._version)
        reader = ArrayRecordReader(str(path), _OPTIONS)
        if reader.num_records() != shard.examples:
            raise ValueError(f"{reader.num_records()} examples; {INDEX} says {shard.examples}")
        return reader


def _check_files(folder: Folder, shards: list[Shard]) -> None:
    wrong, there = [], folder.sizes()
    for shard in shards:
        has = there.get(shard.name)
        if has != shard.bytes:
            words = "is missing" if has is None else f"has {has:,} of {shard.bytes:,} bytes"
            wrong.append(f"{shard.name} {words}")
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(shards)} shards are missing or cut short: {wrong[0]}; "
            "the command that wrote them mends them"
        )


def make(data_config: Any, split: str) -> ShardSource:
    """Read a role's part of the folder `data_config.dir`. Raises ValueError where there is none."""
    if not data_config.dir:
        raise ValueError(
            "data.name='latents' needs data.dir, which python -m latent_diffusion.encode wrote"
        )
    root = Folder(data_config.dir)
    splits = [name for name in root.folders() if INDEX in (root / name).sizes()]
    if split not in splits:
        raise ValueError(
            f"no split {split!r} in data.dir={root}; known: {', '.join(splits) or 'none'} "
            "(python -m latent_diffusion.encode writes them)"
        )
    return ShardSource(root / split)
