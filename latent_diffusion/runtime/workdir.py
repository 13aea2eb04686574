"""The folder of a run: the names of its files, and functions to write and read them.

    config.json            the resolved experiment
    tokenizer.json         the tokenizer, if the model has one
    first_stage.safetensors  the frozen first stage with its latent scale (latent denoising)
    conditioner_NAME.safetensors  a pretrained conditioner with its fields (latent denoising)
    teacher.safetensors    the teacher's network (distillation)
    base.json              fingerprints of the frozen model that an adaptation builds on
    moments-IDENTITY.npy   the training set's latents, where they are encoded once; or codes-…
    texts-IDENTITY.npy     the same for its captions
    checkpoints/ images/ metrics.jsonl, TensorBoard events

A denoiser's workdir has copies of all frozen parts, so that it can be moved, and later changes of
the originals have no effect. Of an adaptation's base it has fingerprints alone.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latent_diffusion.files.reading import read_json, reading
from latent_diffusion.runtime.checkpoint import Checkpointer, CheckpointError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
FIRST_STAGE = "first_stage.safetensors"
TEACHER = "teacher.safetensors"
BASE = "base.json"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path; the file there moves to `path` when it is complete, else it is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that only appears when it is complete, even if the process is killed."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def together(workdir: Path) -> Iterator[Path]:
    """A folder for new files, which move into `workdir` when all of them are written."""
    folder = workdir / ".partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in folder.iterdir():
            os.replace(path, workdir / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def frozen_files(workdir: Path) -> list[Path]:
    """The files that are needed to load a workdir, beside its checkpoints."""
    kinds = (".json", ".safetensors")
    paths = (path for path in workdir.iterdir() if path.suffix in kinds)
    return sorted(path for path in paths if path.name != TEACHER)  # only training reads it


def copies(workdir: Path) -> list[Path]:
    """The files that a run writes at its start, beside its config."""
    names = (TOKENIZER, FIRST_STAGE, TEACHER, BASE, "conditioner_*.safetensors")
    return [path for name in names for path in workdir.glob(name)]


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Write the resolved experiment; only process 0 writes."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_dict(), indent=2)
        write_whole(workdir / CONFIG, text + "\n")


def load_run(workdir: Path) -> ConfigDict | None:
    """The experiment of the run in a workdir; None where it has no checkpoint."""
    checkpoints = (workdir / "checkpoints").glob("*")
    return load_config(workdir) if any(path.name.isdigit() for path in checkpoints) else None


def load_config(workdir: Path) -> ConfigDict:
    """Read a workdir's experiment; ValueError where it isn't a workdir."""
    if not (workdir / CONFIG).exists():
        raise ValueError(f"{workdir} is not a workdir: it has no readable {CONFIG}")
    with reading(workdir / CONFIG):
        return ConfigDict(read_json(workdir / CONFIG))


def load_entry(workdir: Path, entry: str) -> Any:
    """An entry of the state in a workdir's latest good checkpoint; CheckpointError without any."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(only=[entry])
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    return restored.state[entry]


def open_entry(workdir: Path, entry: str) -> Any:
    """Like `load_entry`, but a tree of `Tensor`, which should be read in the tree's order."""
    checkpoints = Checkpointer(
        workdir / "checkpoints", read_only=True
    )  # stays open for the tensors
    tree = checkpoints.open(entry)
    if tree is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    return tree
