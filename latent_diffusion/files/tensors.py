"""Weight files: .safetensors, torch's zip files (.ckpt .bin .pt .pth), sharded indices of either.

Files are mapped into memory, so that a 4 GB checkpoint takes the memory of the tensor that is being
read. Any fault of a file is a ValueError of one line that begins with its path.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.files.reading import MAX_TEXT, read_json, reading
from latent_diffusion.files.tensor import DTYPES, MAX_RANK, Tensor, TensorFile, mapped
from latent_diffusion.files.torch_zip import open_torch_zip

LONGEST_EMPTY = 1 << 20  # longest side of an empty tensor, which the file's size doesn't bound


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """Open a weight file of any kind. Raises ValueError with the reason if it can't be read."""
    path = Path(path)
    with reading(path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        file = _open_sharded(path) if path.name.endswith(".index.json") else _open_one(path)
        for name, tensor in file.tensors.items():
            if not tensor.size and max(tensor.shape) > LONGEST_EMPTY:
                raise ValueError(f"{path}: {name!r} has shape {tensor.shape}, without entries")
        return file


def _open_one(path: Path) -> TensorFile:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return open_torch_zip(path)
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if start[:1] == b"\x80":
        raise ValueError(
            f"{path}: a bare pickle, or torch's format from before 1.6; load and save it again "
            "with a newer torch"
        )
    raise ValueError(f"{path}: neither a safetensors file nor a torch zip file, or cut short")


def _open_sharded(path: Path) -> TensorFile:
    shards = read_json(path, MAX_TEXT).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path}: not an index of shards: weight_map has no names of files")
    opened = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not path.with_name(name).is_file():
            raise ValueError(f"{path}: shard {name!r} is missing, or lies outside the folder")
        opened[name] = _open_one(path.with_name(name)).tensors
    missing = [t for t, name in shards.items() if t not in opened[name]]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is not in its shard {shards[missing[0]]!r}")
    for name, tensors in opened.items():
        if more := [tensor for tensor in tensors if tensor not in shards]:
            raise ValueError(f"{path}: its weight_map lacks {more[0]!r} of the shard {name!r}")
    return TensorFile({tensor: opened[name][tensor] for tensor, name in shards.items()})


def _open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_TEXT):
            raise ValueError(
                f"{path}: its header claims {length:,} bytes, more than there are or than the "
                f"{MAX_TEXT:,} allowed (truncated?)"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = [(name, *_entry(path, name, spec)) for name, spec in header.items()]
    except (
        json.JSONDecodeError,
        UnicodeError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path}: damaged header ({error!r:.200})") from error
    expected = 0
    for name, _, _, start, stop in sorted(entries, key=lambda entry: entry[3:]):
        if start != expected:
            raise ValueError(f"{path}: {name!r} starts at byte {start}, expected {expected}")
        expected = stop
    if 8 + length + expected != size:
        raise ValueError(
            f"{path}: {size:,} bytes, but its header describes {8 + length + expected:,} "
            "(truncated or padded)"
        )
    return TensorFile(
        {
            name: mapped(path, 8 + length + start, dtype, shape)
            for name, dtype, shape, start, _ in entries
        },
        metadata,
    )


def _entry(path: Path, name: str, spec: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if spec["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: {name!r} has unknown dtype {spec['dtype']!r}; known: {', '.join(DTYPES)}"
        )
    dtype, shape, (start, stop) = DTYPES[spec["dtype"]], tuple(spec["shape"]), spec["data_offsets"]
    if len(shape) > MAX_RANK or any(
        type(n) is not int or not 0 <= n < 1 << 63 for n in (*shape, start, stop)
    ):
        raise ValueError(f"{path}: {name!r} has shape {shape!s:.200} at {start!s:.30}:{stop!s:.30}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path}: {name!r} has shape {shape} of {spec['dtype']} but {stop - start} bytes"
        )
    return dtype, shape, start, stop


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write tensors one at a time, in the order of the mapping.

    In the file, tensors lie in the order of their names. The file appears when it is complete.
    progress: is called with the number of elements of each tensor that is written.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset, places = 0, {}
    for name, tensor in sorted(tensors.items()):
        places[name] = offset
        stop = offset + tensor.size * tensor.dtype.itemsize
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors.items():
                file.seek(8 + len(text) + places[name])
                _write(file, tensor)
                progress(tensor.size)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(file: Any, tensor: Tensor) -> None:
    array = tensor.read()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"expected {tensor.shape} {tensor.dtype}, got {array.shape} {array.dtype}")
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def find_weights(folder: Path, stems: Iterable[str], variant: str | None = None) -> Path | None:
    """The weight file in a component's folder, or None.

    Full precision is preferred to fp16, and safetensors to torch's files. stems: file names without
    ending. variant: "fp16" or "non_ema", to accept only such a file.
    """
    for tag in (f".{variant}",) if variant else ("", ".fp16"):
        for stem in stems:
            for ending in (".safetensors", ".bin"):
                for name in (
                    f"{stem}{tag}{ending}",
                    f"{stem}{ending}.index{tag}.json",
                    f"{stem}{ending}{tag}.index.json",
                ):
                    if (folder / name).is_file():
                        return folder / name
    return None
