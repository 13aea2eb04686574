"""Read pickles of other programs without running code from them."""

import io
import pickle
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# The function that rebuilds an array from a pickle; numpy's module that has it is private.
_RECONSTRUCT = np.empty(0).__reduce__()[0]

NUMPY_GLOBALS: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
}


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that builds containers, numbers, strings and the globals in `allowed`.

    A pickle is a program; it requests every callable by its name `module.name`. This unpickler
    looks names up in `allowed` and refuses any other name with a message. persistent: resolves the
    file's references to data outside the pickle; without it they are refused, too.
    """

    def __init__(
        self,
        file: Any,  # readable, of bytes
        allowed: Mapping[str, Any] = NUMPY_GLOBALS,
        persistent: Callable[[Any], Any] | None = None,
    ):
        super().__init__(file)
        self._allowed = allowed
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed global `module.name`; raise UnpicklingError for any other."""
        qualified = f"{module}.{name}"
        if qualified not in self._allowed:
            raise pickle.UnpicklingError(
                f"refused to load {qualified!r}; allowed: {', '.join(sorted(self._allowed))}"
            )
        return self._allowed[qualified]

    def persistent_load(self, pid: Any) -> Any:
        """Return the data to which `pid` refers."""
        if self._persistent is None:
            raise pickle.UnpicklingError(f"refused to load external data {reprlib.repr(pid)}")
        return self._persistent(pid)


def load_pickle(path: str | Path, allowed: Mapping[str, Any] = NUMPY_GLOBALS) -> Any:
    """Read a pickle of plain containers and numpy arrays without running any code in it.

    Raises pickle.UnpicklingError naming the first global outside `allowed`.
    """
    return RestrictedUnpickler(io.BytesIO(Path(path).read_bytes()), allowed).load()
