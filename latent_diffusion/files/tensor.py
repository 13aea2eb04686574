"""Arrays in files or elsewhere, whose shape and dtype are available before they are read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {  # by their names in safetensors
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_RANK = 32  # most dimensions of an array; numpy allows no more
_SMALL = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """An array that may not be in memory yet.

    `read()` returns it, possibly as a view of a file, and reads it anew each time. NumPy functions
    accept the tensor in place of the array. exact: returns the numbers before they are rounded to
    `dtype`; None without rounding.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    exact: Callable[[], np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the array."""
        return self.size * self.dtype.itemsize

    def astype(self, dtype: Any, name: str = "a tensor") -> "Tensor":
        """The same numbers in another dtype; integers and booleans stay as they are.

        name: for the ValueError that reading raises where a number is beyond the range of dtype.
        """
        target = np.dtype(dtype)
        if target == self.dtype or not is_float(self.dtype):
            return self
        return Tensor(self.shape, target, lambda: _cast((self.exact or self.read)(), target, name))

    def changed(self, change: Callable[[np.ndarray], Any], name: str) -> "Tensor":
        """What `change` makes of the numbers in float32, when they are read.

        It is rounded to the dtype of this tensor, but not to eight bits, in which a small change is
        lost; `astype` rounds what isn't rounded yet. name: see `astype`.
        """

        def exact() -> np.ndarray:
            return np.asarray(change(self.astype(np.float32).read()), np.float32)

        whole = Tensor(self.shape, np.dtype(np.float32), exact)
        if self.dtype.itemsize == 1:
            return whole
        return replace(whole.astype(self.dtype, name), exact=exact)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    narrower = float(ml_dtypes.finfo(dtype).max) < float(ml_dtypes.finfo(array.dtype).max)
    if narrower and (np.isfinite(array) & ~np.isfinite(result)).any():  # some dtypes have no inf
        largest = np.abs(array[np.isfinite(array)].astype(np.float64)).max()
        raise ValueError(f"{name} has {largest:.6g}, which is beyond the range of {dtype}")
    return result


def is_float(dtype: np.dtype) -> bool:
    """Whether elements are floating-point numbers, also of kinds that numpy lacks (bfloat16 …)."""
    return dtype.kind == "f" or dtype in _SMALL


def in_memory(array: Any) -> Tensor:
    """A Tensor from any library's array; reading copies an array on a device to the host."""
    return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


def mapped(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """A Tensor at a byte offset of a file; every reading maps it into memory."""

    def read() -> np.ndarray:
        if not math.prod(shape):
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape)

    return Tensor(shape, dtype, read)


@dataclass(frozen=True)
class TensorFile:
    """Named tensors of a file, and the plain data beside them as metadata (`global_step` …)."""

    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
