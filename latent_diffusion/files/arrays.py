"""Read NumPy's files, .npz and .npy, such that any fault of a file is an error of one line."""

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from latent_diffusion.files.reading import reading


@contextlib.contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[Any]:
    """The arrays of an .npz file by name, each of which is read when it is asked for.

    Raises ValueError, which begins with the path, for a file that can't be read, and for any error
    while it is open.
    """
    with reading(path):
        if os.path.isfile(path) and not zipfile.is_zipfile(path):
            raise ValueError("no .npz file, which is a zip of arrays, or only the start of one")
        with np.load(path, allow_pickle=False) as file:
            yield file


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """The array in an .npy file; ValueError, which begins with the path, for any other file."""
    with reading(path), open(path, "rb") as file:
        if not file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise ValueError("no NumPy array: an .npy file is expected")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def check_finite(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if an array of a file, by its name, holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
