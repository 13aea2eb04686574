"""Captions and classes of the pictures in a folder, from files beside them.

All pictures of a folder are described by files of one kind, the first kind that is present of

- `metadata.jsonl`, `metadata.csv` and `metadata.parquet`: a row has `file_name`, the caption (in
  the column "text" or "caption"), and `class_label` or other keys of batches;
- `captions.txt`: `file<TAB>caption` or `file|caption`; a file may have several lines;
- text files of the pictures' names (`cat.png`, `cat.txt`), which hold their captions.

Names are relative to the file that holds them. Text is UTF-8, with or without a byte order mark,
and a line ends at \\n alone.
"""

import codecs
import csv
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.data.contract import KEYS, Key
from latent_diffusion.data.sources import Example, check_caption, flat

logger = logging.getLogger(__name__)

COLUMNS = ("text", "caption")  # columns of captions, where the config names none
MAPS = ("mask", "depth", "segmentation")  # keys for which a row has the name of a picture
_MADE = {"image", "tokens", "weight", "crop_top_left", "target_size"}  # made by the transform
_OBJECTS = {"boxes": Key(np.float32, "B N 4"), "labels": Key(np.int32, "B N", 0)}
_NUMBERS = {k: key for k, key in (KEYS | _OBJECTS).items() if k not in {*_MADE, *MAPS}}
Rows = Iterator[tuple[str, dict[str, Any]]]  # the place of a row, for messages, and the row


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; a ValueError that names file and line unless it is UTF-8."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{number}: byte 0x{content[error.start]:02x} isn't UTF-8 (the file may be "
            "Latin-1 or UTF-16): save it as UTF-8"
        ) from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def describe(paths: list[Path], files: list[Path], column: str = "") -> dict[Path, Example]:
    """The annotations of each picture: its `caption`, `class_label` and so on, and files of maps.

    paths: the pictures; those that are maps of other pictures are left out of the result. files:
    all files of the folder. column: the column of captions in metadata. Raises a ValueError of one
    line for a file that can't be parsed, and for a key other than the caption that only some
    pictures have.
    """
    described: dict[Path, Example] = {}
    for name, read in _READERS.items():
        for file in [file for file in files if file.name == name]:
            described |= read(file, column)
        if described:
            if others := [file for file in files if file.name in _READERS and file.name != name]:
                logger.warning("%s isn't read, since there is a %s", others[0], name)
            break
    if column and (name == "captions.txt" or not described):
        raise ValueError(f"data.caption_column={column!r} needs metadata files, which aren't there")
    if not described:
        there = set(files)
        beside = ((path, path.with_suffix(".txt")) for path in paths)
        texts = {path: "\n".join(read_lines(text)) for path, text in beside if text in there}
        described = {path: {"caption": text.strip()} for path, text in texts.items()}
    by_name = {_composed(path): path for path in paths}
    described = {by_name.get(_composed(path), path): entry for path, entry in described.items()}
    for entry in described.values():
        entry.update({k: by_name.get(_composed(entry[k]), entry[k]) for k in MAPS if k in entry})
    if missing := sorted(path for path in described if not os.path.isfile(path)):
        logger.warning("%d described files are missing: %s", len(missing), missing[0])
    maps = {entry[key] for entry in described.values() for key in MAPS if key in entry}
    return _alike({path: dict(described.get(path, {})) for path in paths if path not in maps})


def maps_of(files: list[Path]) -> set[Path]:
    """The files that metadata among `files` names as maps of pictures; nothing else is checked."""
    metadata = [(file, _ROWS[file.name](file)) for file in files if file.name in _ROWS]
    named = {
        _composed(_beside(file, name))
        for file, rows in metadata
        for _, row in rows
        for name in map(row.get, MAPS)
        if isinstance(name, str)
    }
    return {file for file in files if _composed(file) in named} if named else set()


def _composed(path: Path) -> str:
    """The name with each accented letter as one character; macOS writes two."""
    return unicodedata.normalize("NFC", str(path))


def _alike(entries: dict[Path, Example]) -> dict[Path, Example]:
    """The entries, checked to have the same keys; a warning counts pictures without a caption."""
    captions = {path: entry.pop("caption", "") for path, entry in entries.items()}
    without = [path for path, text in captions.items() if not any(map(str.strip, flat([text])))]
    if len(without) < len(entries):
        captions |= dict.fromkeys(without, "")
        for path, entry in entries.items():
            entry["caption"] = captions[path]
        if without:
            logger.warning(
                "%d of %d pictures have no caption, so theirs is empty: %s",
                *(len(without), len(entries), without[0]),
            )
    for key in {key for entry in entries.values() for key in entry}:
        if lacks := [path for path, entry in entries.items() if key not in entry]:
            raise ValueError(f"{key} is given for some files but not for {lacks[0]}")
    return entries


def _metadata(rows: Callable[[Path], Rows]) -> Callable[[Path, str], dict[Path, Example]]:
    """The reader of a kind of metadata files. rows: yields the rows of such a file."""

    def read(file: Path, column: str) -> dict[Path, Example]:
        entries: dict[Path, Example] = {}
        unused: set[str] = set()
        for where, row in rows(file):
            row = {key: value for key, value in row.items() if value is not None}
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise ValueError(f"{where}: expected a row with file_name, got {[*row]}")
            path, entry = _beside(file, name), _entry(where, file, row, column)
            entries[path] = _joined(where, name, entries[path], entry) if path in entries else entry
            unused |= row.keys()
        if entries and column and not any("caption" in entry for entry in entries.values()):
            names = ", ".join(sorted(map(str, unused))) or "none"
            raise ValueError(f"{file}: no column {column!r} (data.caption_column); others: {names}")
        if unused:
            logger.info("%s: columns that aren't used: %s", file, ", ".join(map(str, unused)))
        return entries

    return read


def _joined(where: str, name: str, first: Example, second: Example) -> Example:
    """The annotations of two rows for one picture: both captions, if all else is equal."""
    rest = [{k: v for k, v in entry.items() if k != "caption"} for entry in (first, second)]
    if repr(rest[0]) != repr(rest[1]) or first.keys() != second.keys():
        raise ValueError(f"{where}: {name} has an earlier row with other values")
    if "caption" not in first:
        return first
    return {**rest[0], "caption": flat([first["caption"], second["caption"]])}


def _beside(file: Path, name: str) -> Path:
    return Path(os.path.normpath(file.parent / name))


def _entry(where: str, file: Path, row: dict[str, Any], column: str) -> Example:
    """The annotations that a row has for its picture; removes them from the row."""
    entry: Example = {}
    for name in (column,) if column else COLUMNS:
        if (caption := row.pop(name, None)) is not None and "caption" not in entry:
            entry["caption"] = check_caption(caption, f"{where}: {name}")
    for key in MAPS:
        if (value := row.pop(key, None)) is not None:
            if not isinstance(value, str):
                raise ValueError(f"{where}: {key} is {value!r}, expected the name of a picture")
            entry[key] = _beside(file, value)
    for name in _NUMBERS.keys() & row.keys():
        entry[name] = _numbers(where, name, row.pop(name))
    return entry


def _numbers(where: str, name: str, value: Any) -> Any:
    """The value of a batch key in a row, an array unless it is a single number."""
    key, (_, *dims) = _NUMBERS[name], _NUMBERS[name].shape.split()
    try:
        value = json.loads(value) if isinstance(value, str) else value
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if name in _OBJECTS and not array.size:
        array = np.zeros([0 if dim == "N" else int(dim) for dim in dims], key.dtype)
    whole = key.dtype is np.int32
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        wanted = "integers" if array.ndim else "an integer"
        raise ValueError(f"{where}: {name} is {value!r}, expected {wanted if whole else 'numbers'}")
    fixed = [(i, int(dim)) for i, dim in enumerate(dims) if dim.isdigit()]
    if array.ndim != len(dims) or any(array.shape[i] != count for i, count in fixed):
        wanted = f"[{' '.join(dims)}]" if dims else "one number"
        raise ValueError(f"{where}: {name} has shape {array.shape}, expected {wanted}")
    largest = np.iinfo(np.int32).max if whole else np.finfo(np.float32).max
    low, high = max(key.low, -largest), min(key.high, largest)
    if array.size and not low <= array.min() <= array.max() <= high:
        limits = f"[{low:g}, {high:g}]"
        raise ValueError(f"{where}: {name} is {value!r}, which is out of range: {limits}")  # or NaN
    return array if dims else value


def _jsonl(file: Path) -> Rows:
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number}: expected a JSON object with file_name")
        yield f"{file}:{number}", row


def _csv(file: Path) -> Rows:
    lines = [f"{line}\n" for line in read_lines(file)]
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise ValueError(f"{where}: a row of another length than the {columns} columns")
            yield where, {key: value for key, value in row.items() if value != ""}
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: {error}") from None


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pip install pyarrow") from None
    try:
        rows = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{file}:row {number}", row


def _captions(file: Path, column: str) -> dict[Path, Example]:
    captions: dict[Path, list[str]] = {}
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        name, separator, caption = line.partition("\t" if "\t" in line else "|")
        if not separator:
            raise ValueError(f"{file}:{number}: expected 'file<TAB>caption' or 'file|caption'")
        captions.setdefault(_beside(file, name.strip()), []).append(caption.strip())
    return {path: {"caption": c[0] if len(c) == 1 else c} for path, c in captions.items()}


_ROWS: Mapping[str, Callable[[Path], Rows]] = {
    "metadata.jsonl": _jsonl,
    "metadata.csv": _csv,
    "metadata.parquet": _parquet,
}
_READERS: Mapping[str, Callable[[Path, str], dict[Path, Example]]] = {
    **{name: _metadata(rows) for name, rows in _ROWS.items()},
    "captions.txt": _captions,
}
FILES = tuple(_READERS)  # names of files that describe pictures
