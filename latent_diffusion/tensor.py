"""Arrays that lie elsewhere: known by shape and dtype, read when asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_SMALL = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array that isn't in memory yet. `read()` returns it, possibly as a view of a file.

    It is read anew for every use. NumPy takes it for the array that it stands for.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it would take."""
        return self.size * self.dtype.itemsize

    def astype(self, dtype: Any) -> "Tensor":
        """The same numbers in another dtype; integers and booleans stay as they are."""
        wanted = np.dtype(dtype)
        if wanted == self.dtype or not is_float(self.dtype):
            return self
        return Tensor(self.shape, wanted, lambda: self.read().astype(wanted))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


def is_float(dtype: np.dtype) -> bool:
    """Whether elements are floating-point numbers, those that numpy doesn't know included."""
    return dtype.kind == "f" or dtype in _SMALL
