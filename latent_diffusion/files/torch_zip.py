"""Read torch's zip files without torch: a pickle of the structure, and an entry for each storage.

The interpreter of pickles gets stand-ins for the few names that tensors need. They only describe
where a tensor lies in the file; all other names are refused.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_diffusion.files import pickles
from latent_diffusion.files.pickles import Call, Name, short
from latent_diffusion.files.reading import MAX_TEXT
from latent_diffusion.files.tensor import DTYPES, MAX_RANK, Tensor, TensorFile, mapped

_LOCAL_HEADER = 30  # bytes before an entry's name
MAX_PICKLE = 16 << 20  # bytes; the pickle of a model with 10⁴ tensors has about one million
_DIRECTORY_END, _DIRECTORY_END_64 = 22, 56 + 20  # bytes of the records after the list of entries


class _Storage(NamedTuple):
    """A flat array in the file."""

    flat: Tensor


_STORAGES = {  # torch's classes → names in DTYPES
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
_TORCH_DTYPES = {  # torch's names → names in DTYPES
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16",
}  # fmt: skip


def _tensor(
    storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> Tensor:
    """A tensor as a view of a storage.

    rest: gradient flags and hooks, which are ignored, and perhaps a dictionary of flags.
    """
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"a tensor of {short(storage)}, which is no storage")
    for flag in ("neg", "conj"):
        if any(isinstance(flags, dict) and flags.get(flag) for flags in rest[2:]):
            raise pickle.UnpicklingError(
                f"a tensor with torch's {flag} flag; save what its resolve_{flag}() returns"
            )
    flat, shape, stride = storage.flat, tuple(shape), tuple(stride)
    if (
        len(shape) != len(stride)
        or len(shape) > MAX_RANK
        or any(type(n) is not int or n < 0 for n in (offset, *shape, *stride))
    ):
        where = f"{short(offset)} of shape {short(shape)}, strides {short(stride)}"
        raise pickle.UnpicklingError(f"a tensor at {where}")
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if size and (last >= flat.size or size > flat.size):
        raise pickle.UnpicklingError(
            f"a tensor at {offset} of shape {shape}, strides {stride} exceeds its storage of "
            f"{flat.size} elements"
        )

    def read() -> np.ndarray:
        if not size:
            return np.empty(shape, flat.dtype)
        width = flat.dtype.itemsize
        start = flat.read()[offset:].view(f"u{width}")  # numpy strides no float8_e5m2
        strides = [step * width for step in stride]
        bits = np.lib.stride_tricks.as_strided(start, shape, strides, writeable=False)
        return bits.view(flat.dtype)

    return Tensor(shape, flat.dtype, read)


def _typed_tensor(
    storage: Any,
    offset: int,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> Tensor:
    """A tensor as a view of a storage of bytes, as torch saves its newer dtypes."""
    name = dtype.name if isinstance(dtype, Name) else None
    if not isinstance(storage, _Storage) or name not in _TORCH_DTYPES:
        raise pickle.UnpicklingError(f"a tensor of {short(dtype)} in {short(storage)}")
    flat, kind = storage.flat, DTYPES[_TORCH_DTYPES[name]]
    if flat.nbytes % kind.itemsize:
        raise pickle.UnpicklingError(f"a tensor of {name} in a storage of {flat.nbytes} bytes")
    size = flat.nbytes // kind.itemsize
    typed = _Storage(Tensor((size,), kind, lambda: flat.read().view(kind)))
    return _tensor(typed, offset, shape, stride, grad, hooks, *rest)


def _scalar(dtype: Any, data: Any) -> Any:
    """A numpy scalar, which Lightning's callbacks save."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a numpy scalar of {short(dtype)}")
    return np.frombuffer(data, dtype)[0]


def _dtype(name: str, *flags: Any) -> np.dtype:
    """The type of a numpy scalar."""
    return np.dtype(name) if name in ("f8", "f4", "f2", "i8", "i4", "b1", "u1") else np.dtype("V1")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """The bytes of a text; pickles of protocol 2 express bytes by this call."""
    return text.encode(encoding)


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": Call(lambda: OrderedDict()),  # without arguments, which it copies
    "torch._utils._rebuild_tensor_v2": Call(_tensor),
    "torch._utils._rebuild_tensor_v3": Call(_typed_tensor),
    "torch._utils._rebuild_tensor": Call(_tensor),
    "torch._utils._rebuild_parameter": Call(lambda data, *rest: data),
    "torch.Size": Call(tuple),
    "_codecs.encode": Call(_encode),
    "numpy.dtype": Call(_dtype),
    "numpy.core.multiarray.scalar": Call(_scalar),
    "numpy._core.multiarray.scalar": Call(_scalar),
    **{f"torch.{name}": Name(name) for name in (*_STORAGES, *_TORCH_DTYPES)},
    "torch.storage.UntypedStorage": Name("UntypedStorage"),
    # A key in the dictionary of callbacks that Lightning saves; it is never built.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Name("ModelCheckpoint"),
}


def open_torch_zip(path: Path) -> TensorFile:
    """Open a file that torch.save wrote. Raises ValueError with the reason if it can't be read.

    The tensors of a training checkpoint are those of its `state_dict`; plain data beside it become
    metadata.
    """
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _check_entries(path, archive)
            root = next((name[: -len("data.pkl")] for name in entries if _is_pickle(name)), None)
            if root is None:
                raise ValueError(f"{path}: a zip file without data.pkl: torch didn't write it")
            order = entries.get(f"{root}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise ValueError(f"{path}: big-endian storages are not supported")
            if entries[f"{root}data.pkl"].file_size > MAX_PICKLE:
                raise ValueError(f"{path}: its pickle exceeds {MAX_PICKLE:,} bytes")
            program = archive.read(f"{root}data.pkl")
        tree = _unpickle(path, program, root, entries)
    except Exception as error:  # a damaged zip file can fail in many ways
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: damaged or truncated zip file ({error})") from error
    return _as_file(path, tree)


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _check_directory(path: Path) -> None:
    """Raise ValueError for a list of entries that is too large for memory, before it is read."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - _DIRECTORY_END - _DIRECTORY_END_64))
        tail = file.read()
    at = len(tail) - _DIRECTORY_END
    at = at if tail[at : at + 4] == b"PK\x05\x06" else tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[at + 12 : at + 16], "little")
    if length == 0xFFFFFFFF:  # a larger number lies in a record before it
        start = at - _DIRECTORY_END_64
        length = int.from_bytes(tail[start + 40 : start + 48], "little")
    if at >= 0 and length > MAX_TEXT:
        raise ValueError(f"{path}: a list of entries of {length:,} bytes")


def _check_entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name; ValueError for kinds of entries that torch.save never writes."""
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(
                f"{path}: entry {info.filename!r} is compressed ({info.compress_size:,} to "
                f"{info.file_size:,} bytes); torch stores, so this is refused"
            )
        if info.flag_bits & 1:
            raise ValueError(f"{path}: entry {info.filename!r} is encrypted")
        if info.header_offset < end:
            raise ValueError(f"{path}: entry {info.filename!r} overlaps another")
        end = info.header_offset + _LOCAL_HEADER + len(info.filename.encode()) + info.file_size
    if end > path.stat().st_size:
        raise ValueError(f"{path}: truncated: its entries end at byte {end:,}")
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise ValueError(f"{path}: two of its entries have the same name")
    return entries


def _unpickle(path: Path, program: bytes, root: str, entries: Mapping[str, zipfile.ZipInfo]) -> Any:
    def storage(pid: Any) -> _Storage:
        """("storage", type, key, device, number of elements) -> the flat array in the file."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"refused to load external data {short(pid)}")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, Name) or kind.name not in _STORAGES:
            raise pickle.UnpicklingError(f"a storage of unknown type {short(kind)}")
        dtype = DTYPES[_STORAGES[kind.name]]
        info = entries.get(f"{root}data/{key}")
        if info is None:
            raise pickle.UnpicklingError(f"storage {key!r} is missing")
        if type(numel) is not int or numel < 0 or info.file_size != numel * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key!r} claims {numel} elements of {dtype} but has {info.file_size} bytes"
            )
        return _Storage(mapped(path, _data_offset(path, info), dtype, (numel,)))

    try:
        return pickles.run(program, ALLOWED, storage)
    except Exception as error:  # a hostile pickle can raise any exception
        reason = str(error) or type(error).__name__
        if not isinstance(error, pickle.UnpicklingError):
            reason = f"damaged pickle: {reason}"
        raise ValueError(f"{path}: {reason[:1000]}") from error


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """The position of an entry's bytes, by the lengths of name and padding in its header."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = info.header_offset + _LOCAL_HEADER + name + extra
    if header[:4] != b"PK\x03\x04" or start + info.file_size > path.stat().st_size:
        raise pickle.UnpicklingError(f"entry {info.filename!r} is truncated")
    return start


def _as_file(path: Path, tree: Any) -> TensorFile:
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tree).__name__}")
    inner = tree.get("state_dict", tree)
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: its state_dict is a {type(inner).__name__}")
    inside = {
        f"{name}.{key}": value
        for name in ("string_to_param", "image_proj", "ip_adapter")  # textual inversion, IP-Adapter
        if isinstance(inner.get(name), dict)
        for key, value in inner[name].items()
    }
    inner = inside or inner
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; keys: {short(list(tree))}")
    plain = (bool, int, float, str)
    return TensorFile(tensors, {k: v for k, v in tree.items() if isinstance(v, plain)})
