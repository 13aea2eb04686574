"""Settings of all commands before they start: a compilation cache, and fewer log lines."""

import logging
import os
import time
from pathlib import Path

import jax

from latent_diffusion.runtime import programs


def seconds_since_start() -> float:
    """Wall-clock age of this process; where the system doesn't provide it, its CPU time."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return now - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


def quiet_and_cached() -> None:
    """Cache compiled programs on disk, so that the second start is fast; hide JAX's log messages.

    The cache lies in $JAX_COMPILATION_CACHE_DIR, else in $XDG_CACHE_HOME (or ~/.cache) under
    latent_diffusion/jax; its folder programs has those of `programs`.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "latent_diffusion" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    cache = jax.config.values["jax_compilation_cache_dir"]
    if cache and "://" not in cache:
        programs.folder = Path(cache) / "programs"
