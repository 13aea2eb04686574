"""Parquet files with the bytes of pictures, as in Hugging Face's data sets.

A row is an example: its picture is in a column of bytes or of {bytes, path}; the caption and the
class are in columns that `data.features` names, or that have the usual names. Reading one row reads
its whole row group, so reading in random order needs small groups, or shards of latents, which are
encoded in the order of the rows.

Splits are the files train-*.parquet and test-*.parquet, or those below folders train/ and test/, if
there are any. Otherwise "test" is a random share `test_fraction` of the rows, for which a file's
name is the seed, "train" is the rest, and "all" is both.
"""

import functools
import io
from typing import Any

import numpy as np

from latent_diffusion.data.folders import encoded, file_system, visible_files
from latent_diffusion.data.pictures import READ_MAPS, read_image, size_of
from latent_diffusion.data.sources import Example, Readable, check_caption, check_split
from latent_diffusion.data.tfds import feature_map
from latent_diffusion.files.reading import reading

GROUPS_IN_MEMORY = 16
SPLITS = ("train", "test")


class ParquetSource(Readable):
    """Rows of files. groups: (file, number of the row group, its length). rows: of the split."""

    def __init__(
        self, system: Any, groups: list[tuple[str, int, int]], rows: np.ndarray, columns: dict
    ):
        super().__init__(len(rows))
        self.system, self.columns = system, columns
        self._groups, self._rows = groups, rows
        self._ends = np.cumsum([count for *_, count in groups])
        self._group = functools.lru_cache(GROUPS_IN_MEMORY)(self._read_group)

    def __reduce__(self) -> Any:
        return type(self), (self.system, self._groups, self._rows, self.columns)

    def name_of(self, index: int) -> str:
        """The file, the row group, and the row in the group."""
        number, row = self._place(index)
        return f"{self._groups[number][0]}, row group {self._groups[number][1]}, row {row}"

    def read(self, index: int) -> Example:
        """Example number `index`. Raises ValueError where it can't be read."""
        example = {"name": self.name_of(index), **self._values(index, [*self.columns])}
        for key, read in READ_MAPS.items():
            if isinstance(example.get(key), bytes | dict):  # others are lists of numbers
                example[key] = read(_bytes(example[key]))
        return {**example, "image": read_image(_bytes(example.get("image")))}

    def captions(self) -> list[str]:
        """All captions, in order; the pictures are read with them, but not decoded."""
        if "caption" not in self.columns:
            return [""] * len(self)
        return self.texts(lambda i: self._values(i, ["caption"])["caption"])

    def shapes(self) -> np.ndarray:
        """Height and width [N 2] of the pictures, from their headers."""
        return self.sizes(lambda i: size_of(_bytes(self._values(i, ["image"])["image"])))

    def _place(self, index: int) -> tuple[int, int]:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - int(self._ends[number] - self._groups[number][2])

    def _values(self, index: int, keys: list[str]) -> Example:
        number, row = self._place(index)
        table = self._group(number)
        values = {key: table[self.columns[key]][row].as_py() for key in keys}
        if "caption" in values:
            values["caption"] = check_caption(values["caption"] or "")
        label = values.get("class_label", 0)
        if not isinstance(label, int):
            raise ValueError(f"class_label is {label!r}, expected an integer")
        if missing := [key for key, value in values.items() if value is None]:
            raise ValueError(f"no {missing[0]} (column {self.columns[missing[0]]!r})")
        return values

    def _read_group(self, number: int) -> Any:
        from pyarrow import parquet

        path, group, _ = self._groups[number]
        with reading(path), self.system.open(path, "rb") as file:
            return parquet.ParquetFile(file).read_row_group(group, [*self.columns.values()])


def _bytes(value: Any) -> io.BytesIO:
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise ValueError("no bytes of a picture")
    return io.BytesIO(value)


def _metadata(system: Any, path: str) -> tuple[list[str], list[tuple[str, int, int]]]:
    """The columns of a file, and its row groups."""
    from pyarrow import parquet

    with reading(path), system.open(path, "rb") as opened:
        file = parquet.ParquetFile(opened)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return file.schema_arrow.names, [(path, i, count) for i, count in enumerate(counts)]


def make(data_config: Any, split: str) -> ParquetSource:
    """A split of the files in `data_config.dir`. Raises ValueError where there are none."""
    if not data_config.dir:
        raise ValueError("data.name='parquet' needs data.dir, the folder of Parquet files")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError("data.name='parquet' needs pip install pyarrow") from None
    system, root = file_system(data_config.dir)
    every = list(visible_files(system, root, ".parquet"))
    if not every:
        raise ValueError(f"data.dir={data_config.dir}: no .parquet files in this folder")
    named = {name: [p for p in every if _split_of(p, root) == name] for name in SPLITS}
    by_name = [name for name, paths in named.items() if paths]
    check_split(split, by_name, root)
    groups, chosen, columns = [], [], dict[str, list[str]]()
    for path in named[split] if by_name else every:
        columns[path], more = _metadata(system, path)
        groups += more
        name, count = path.rpartition("/")[2], sum(count for *_, count in more)
        held_out = np.random.default_rng([*encoded(name)]).random(count) < data_config.test_fraction
        whole = bool(by_name) or split == "all"
        chosen.append(np.ones(count, bool) if whole else held_out == (split == "test"))
    rows = np.flatnonzero(np.concatenate(chosen))
    if not len(rows):
        raise ValueError(f"none of the rows of {root} belongs to split {split!r}")
    in_any = list(dict.fromkeys(name for names in columns.values() for name in names))
    features = feature_map(dict(data_config.features), in_any, root)
    for path, names in columns.items():
        if missing := [name for name in features.values() if name not in names]:
            raise ValueError(f"{path} has no column {missing[0]!r}, unlike other files of {root}")
    return ParquetSource(system, groups, rows, features)


def _split_of(path: str, root: str) -> str:
    """The split that a file belongs to by its folders below `root` or by its name; "" for none."""
    *folders, name = path.removeprefix(root).split("/")
    named = [split for split in SPLITS if name.startswith((f"{split}-", f"{split}."))]
    return next((part for part in (*folders, *named) if part in SPLITS), "")
