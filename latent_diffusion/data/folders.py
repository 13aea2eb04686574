"""Folders on this machine, or on a file system of fsspec ("gs://…", "s3://…"), and their files.

A file appears under its name only when it is complete. On this machine it is written under another
name and then renamed. For other file systems it is written to a temporary file on this machine,
uploaded under another name, and moved there after a check of its size: by renaming, or else by a
copy, which object stores show when it is complete.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_diffusion.runtime import workdir


def file_system(name: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it. ValueError if there is none."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:  # its package is absent; its protocol is unknown
        raise ValueError(f"{name}: {error}") from error
    return system, root


def visible_files(system: Any, root: str, suffix: str) -> dict[str, Any]:
    """The files below a folder whose names end in `suffix`, sorted, with what is known of each.

    Files and folders whose names begin with a dot are left out.
    """
    files = system.find(root, detail=True)
    shown = (p for p in sorted(files) if "/." not in p.removeprefix(root) and p.endswith(suffix))
    return {path: files[path] for path in shown}


def encoded(name: str) -> bytes:
    """A name in UTF-8; of a file whose name isn't UTF-8, the name's bytes."""
    return name.encode(errors="surrogateescape")


class Folder:
    """A folder by its path or URL; it may not exist yet. Raises ValueError for unknown URLs."""

    def __init__(self, name: str | os.PathLike):
        self.name = os.fspath(name)
        self._path = None if "://" in self.name else Path(self.name).expanduser()
        self._system, self._root = file_system(self.name if self._path is None else str(self._path))

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.name.rstrip('/')}/{name}")

    def sizes(self) -> dict[str, int]:
        """The names of the files in it, and their sizes in bytes."""
        return {name: info["size"] for name, info in self._listed("file")}

    def folders(self) -> list[str]:
        """The names of the folders in it."""
        return sorted(name for name, _ in self._listed("directory"))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._system.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """A path on this machine; the file that is written there is then moved to `name`.

        Raises OSError where it can't be uploaded.
        """
        if self._path is not None:
            self._path.mkdir(parents=True, exist_ok=True)
            with workdir.whole(self._path / name) as partial:
                yield partial
            return
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / name
            yield written
            sent_as, size = f"{self._root}/.{name}.partial", written.stat().st_size
            try:
                self._system.makedirs(self._root, exist_ok=True)
                self._system.put_file(str(written), sent_as)
                if (sent := self._system.info(sent_as)["size"]) != size:
                    raise OSError(f"{sent:,} of {size:,} bytes were sent")
                self._system.mv(sent_as, f"{self._root}/{name}")
            except Exception as error:  # each file system raises other exceptions
                raise OSError(f"{self}/{name}: {error}") from error

    def local(self, name: str, version: str) -> Path:
        """The path of a file on this machine; other file systems' files are copied on first use.

        version: that of the folder; copies of other versions aren't used. Copies lie in
        $XDG_CACHE_HOME (or ~/.cache) under latent_diffusion/shards.
        """
        if self._path is not None:
            return self._path / name
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(f"{self}\n{version}".encode()).hexdigest()[:16]
        path = caches / "latent_diffusion" / "shards" / digest / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Other processes may copy the same file at the same time.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                copy = Path(folder) / name
                self.fetch(name, copy)
                os.replace(copy, path)
        return path

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a path on this machine."""
        self._system.get_file(f"{self._root}/{name}", str(target))

    def _listed(self, kind: str) -> Iterator[tuple[str, Any]]:
        self._system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for info in self._system.ls(self._root, detail=True):
                if info["type"] == kind:
                    yield info["name"].rstrip("/").rpartition("/")[2], info
