"""What a workdir holds besides its checkpoints, and how the one stage finds the other's.

    config.json            the resolved experiment
    tokenizer.json         the vocabulary, where there is one
    first_stage.safetensors  the frozen first stage with its latent scale (latent denoising)
    conditioner_NAME.safetensors  a pretrained conditioner with its fields (latent denoising)
    moments-IDENTITY.npy   the training set's latents, where they are encoded once
    checkpoints/ images/ metrics.jsonl, TensorBoard events

A denoiser's workdir keeps its own copy of what is frozen: it can be moved, and what is done to the
originals can't change it.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from latent_diffusion import data, processes
from latent_diffusion.checkpoint import Checkpointer, CheckpointError, load_tree, save_tree
from latent_diffusion.conditioners import Conditioner, make_conditioner
from latent_diffusion.first_stage import FirstStage
from latent_diffusion.tokenizers import TOKENIZERS, Tokenizer, WordTokenizer, load_tokenizer
from latent_diffusion.types import Params, lookup

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
FIRST_STAGE = "first_stage.safetensors"

# task -> the task whose workdir it builds on, and a config that trains one
_BUILDS_ON = {
    "denoising": ("autoencoding", "openmoji_autoencoder.py"),
    "classifying": ("denoising", "openmoji_unconditional.py"),
}


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path to write: the file is under `path` when that is done, whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there complete or not at all, whenever the process is killed."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Write the resolved experiment; process 0 only."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_dict(), indent=2)
        write_whole(workdir / CONFIG, text + "\n")


def load_config(workdir: Path) -> ConfigDict:
    """Read a workdir's experiment; ValueError where it isn't a workdir."""
    try:
        return ConfigDict(json.loads((workdir / CONFIG).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{workdir} is not a workdir: it has no readable {CONFIG}") from error
    except ValueError as error:
        raise ValueError(f"{workdir / CONFIG} is damaged: {error}") from error


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the architecture of the first stage it builds on, if it names one.

    Raises ValueError, with the command that makes one, where that first stage isn't usable.
    """
    config = config.copy_and_resolve_references()
    if config.task not in _BUILDS_ON:
        return config
    if config.task == "denoising" and config.autoencoder.regularization == "identity":
        return config
    if config.task == "denoising" and config.init_from and not config.first_stage.path:
        return config  # it brings its own
    wanted, example = _BUILDS_ON[config.task]
    hint = (
        f"train one with: python train.py --config=configs/{example} "
        f"--workdir={config.first_stage.path or 'runs/first_stage'}, "
        "and name its workdir by --config.first_stage.path"
    )
    if not config.first_stage.path:
        raise ValueError(f"first_stage.path is empty, but {config.task} needs one; {hint}")
    path = Path(config.first_stage.path)
    try:
        theirs = load_config(path)
    except ValueError as error:
        raise ValueError(f"first_stage.path={path} is not usable: {error}; {hint}") from error
    if theirs.task != wanted:
        raise ValueError(f"first_stage.path={path} holds a run of {theirs.task!r}; {hint}")
    config.autoencoder = theirs.autoencoder
    if config.task == "classifying":
        config.diffusion = theirs.diffusion
    return config


def load_autoencoder_params(workdir: Path, config: ConfigDict | None = None) -> Params:
    """The averaged (else the last) parameters of a workdir of perceptual compression."""
    config = load_config(workdir) if config is None else config
    return load_entry(workdir, "ema_params" if config.ema_decay else "params")["autoencoder"]


def load_entry(workdir: Path, entry: str) -> Any:
    """One entry of the state in a workdir's latest good checkpoint; CheckpointError without any."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(only=[entry])
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    return restored.state[entry]


def open_entry(workdir: Path, entry: str) -> Any:
    """As `load_entry`, but a tree of `Tensor`; they are best read in their order."""
    checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)  # open while they are used
    tree = checkpoints.open(entry)
    if tree is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    return tree


def save_first_stage(workdir: Path, first_stage: FirstStage, source: str) -> None:
    """Keep a copy of the frozen first stage and its scale. source: where it came from."""
    tree = {
        "params": first_stage.params,
        "scale_factor": first_stage.scale_factor,
        "shift": first_stage.shift,
    }
    save_tree(workdir / FIRST_STAGE, tree, {"source": source})


def load_first_stage(workdir: Path, module: nn.Module) -> FirstStage:
    """The first stage that `save_first_stage` kept."""
    tree, _ = load_tree(workdir / FIRST_STAGE)
    return FirstStage(
        params=tree.get("params", {}),
        scale_factor=jnp.asarray(tree["scale_factor"]),
        shift=jnp.asarray(tree["shift"]),
        module=module,
    )


def kept_conditioner(workdir: Path, name: str) -> Path:
    """The file that keeps the pretrained conditioner `name`."""
    return workdir / f"conditioner_{name}.safetensors"


def save_conditioner(
    workdir: Path, name: str, params: Params, fields: Mapping[str, Any], source: str
) -> None:
    """Keep a copy of a pretrained conditioner. source: where it came from."""
    metadata = {"source": source, "fields": dict(fields)}
    save_tree(kept_conditioner(workdir, name), params, metadata)


def load_conditioner(workdir: Path, name: str) -> tuple[Params, dict[str, Any]]:
    """Parameters and fields of a conditioner that `save_conditioner` kept."""
    tree, metadata = load_tree(kept_conditioner(workdir, name))
    return tree, metadata["fields"]


def make_tokenizer(config: ConfigDict, workdir: Path, source: Any) -> Tokenizer | None:
    """The workdir's tokenizer, made the first time: read from files, or from the captions."""
    own = config.tokenizer
    if own.name == "none":
        return None
    kind = lookup(TOKENIZERS, own.name, "tokenizer.name")
    if jax.process_index() == 0 and not (workdir / TOKENIZER).exists():
        if kind is WordTokenizer:
            made = kind.train(data.captions(source), own.vocab_size, own.max_length)
        elif not own.path:
            raise ValueError(f"tokenizer.name={own.name!r} needs tokenizer.path: its files")
        else:
            made = kind.read(own.path, own.max_length)
        with whole(workdir / TOKENIZER) as partial:
            made.save(partial)
    processes.barrier("tokenizer")
    tokenizer = load_tokenizer(workdir / TOKENIZER)
    check_reads(make_conditioner(config.conditioners), tokenizer)
    return tokenizer


def check_reads(conditioner: Conditioner, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a text encoder that would misread this tokenizer's numbers."""
    for name, part in zip(conditioner.config, conditioner.parts(), strict=True):
        if "tokens" not in part.keys:
            continue
        if part.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"conditioners.{name}.vocab_size={part.vocab_size}, "
                f"but the tokenizer has {tokenizer.vocab_size} tokens"
            )
        for field in ("empty", "pad_id"):
            wanted = getattr(tokenizer, field)
            own = getattr(part, field, wanted)
            own = tuple(own) if isinstance(own, list) else own  # as JSON has it
            if own != wanted:
                raise ValueError(
                    f"conditioners.{name}.{field}={own}, but the tokenizer's is {wanted}: set it, "
                    "or dropped conditions aren't the empty prompt"
                )


def check_same_tree(expected: Params, got: Params, source: str) -> None:
    """Raise ValueError that names the first differing parameter."""

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves
        }

    want, have = shapes(expected), shapes(got)
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            raise ValueError(
                f"{source} holds another architecture: {path}: expected "
                f"{want.get(path, 'nothing')}, got {have.get(path, 'nothing')}"
            )
