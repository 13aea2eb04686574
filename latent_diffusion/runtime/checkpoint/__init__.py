"""Checkpoints of a run (Orbax), trees of constants in one file, and the lock on a workdir.

A checkpoint is a directory `<step>/` with two items: `state`, any pytree of arrays, and `metadata`,
JSON, which also holds a fingerprint of every array. Orbax writes it under a temporary name, renames
it when it is complete, and removes old checkpoints after that. So a failed save leaves the previous
checkpoint intact, and restoring detects later damage on disk.
"""

from latent_diffusion.runtime.checkpoint.checkpointer import Checkpointer, Restored
from latent_diffusion.runtime.checkpoint.errors import (
    ArchitectureMismatch,
    CheckpointError,
    WorkdirInUse,
)
from latent_diffusion.runtime.checkpoint.integrity import fingerprints
from latent_diffusion.runtime.checkpoint.lock import WorkdirLock, acquire_lock
from latent_diffusion.runtime.checkpoint.trees import load_tree, save_tree, tree_hash
