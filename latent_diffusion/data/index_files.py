"""Stored indices of large data sets, which are made once and used until the data change.

They lie in $XDG_CACHE_HOME (or ~/.cache) under latent_diffusion/indices, one file for each folder
and way of reading it; a file can be deleted at any time.
"""

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.data.folders import encoded
from latent_diffusion.runtime.workdir import whole

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def remembered(kind: str, root: str, state: Any, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of `make()`, read from a file instead if that was written for the same `state`.

    kind, root: determine the file's name. state: a sequence of texts that changes when the data do.
    If the file can't be written, a warning is logged.
    """
    digest = hashlib.sha256()
    for text in state:
        digest.update(encoded(text) + b"\n")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(encoded(f"{kind}\n{root}")).hexdigest()[:16]
    path = caches / "latent_diffusion" / "indices" / f"{kind}-{name}.npz"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:
            if str(saved["state"]) == digest.hexdigest():
                return {key: saved[key] for key in saved.files if key != "state"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or damaged
        pass
    arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:
            np.savez(file, state=digest.hexdigest(), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        logger.warning("%s isn't written, so the next start indexes again: %s", path, error)
    return arrays
