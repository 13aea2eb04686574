"""Read files of other programs, such that any fault of a file is an error of one line.

A damaged file can make the code that reads it fail in many ways, and a hostile file can ask for
more memory than there is. So sizes are checked before a file is read, and any exception becomes a
ValueError that begins with the path.
"""

import gzip
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

# Largest numbers of bytes: of a vocabulary, an index or a header; of a file of settings, of which
# several are in memory at a time, where JSON takes up to 24 times its length.
MAX_TEXT, MAX_SETTINGS = 8 << 20, 1 << 20
_LONGEST = 2000  # most characters of a message


class reading:
    """A context manager that turns any error into a ValueError that begins with `path`."""

    def __init__(self, path: str | os.PathLike):
        self._path = str(path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise ValueError(_message(self._path, error)) from error


def _message(path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        text = error.strerror or text
    elif not isinstance(error, ValueError | ModuleNotFoundError | RuntimeError) or not text:
        text = f"damaged, or no file of this kind: {type(error).__name__} {text}".rstrip()
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return text if text.startswith(path) else f"{path}: {text}"


def read_bytes(path: Path, most: int = MAX_TEXT) -> bytes:
    """Read a small file; ValueError for a larger one, or no regular file (a pipe, a device …)."""
    with reading(path):
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("no regular file")
            if status.st_size > most:
                raise ValueError(
                    f"{status.st_size:,} bytes; files of its kind have {most:,} at most"
                )
            data: bytes = file.read(most + 1)
        return data


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking, even a pipe into which nobody writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """Read a small UTF-8 text, also as Windows writes it; see `read_bytes`.

    Lines end with "\\n", and a byte order mark is left out.
    """
    with reading(path):
        return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n")


def read_gzip(path: Path) -> str:
    """Read a small compressed text; ValueError if it is too large when decompressed."""
    with reading(path):
        with gzip.open(io.BytesIO(read_bytes(path))) as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT:,} bytes when it is unpacked")
        return data.decode("utf-8")


def read_json(path: Path, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """Read a JSON object; a ValueError names a file that can't be read or has no object.

    most: the largest number of bytes; `MAX_TEXT` is for vocabularies and indices.
    """
    with reading(path):
        content = json.loads(read_text(path, most), parse_constant=_infinity)
        if not isinstance(content, dict):
            raise ValueError(f"not a JSON object, but {type(content).__name__}")
        return content


def _infinity(name: str) -> float:
    if name != "-Infinity":  # which diffusers writes in configs of DPM-Solver
        raise ValueError(f"{name} is no number in JSON")
    return float(name)
