"""Checkpoints of a run (Orbax), trees of constants in one file, and the lock on a workdir.

A checkpoint is a directory `<step>/` with two items: `state`, any pytree of arrays, and `metadata`,
JSON. Orbax writes it under a temporary name and renames it when it is complete, and removes old
ones only after that, so whatever happens during a save, the previous checkpoint is still there.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from etils import epath
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from latent_diffusion.types import PyTree

log = logging.getLogger(__name__)

FORMAT = "latent_diffusion"  # marks a checkpoint as ours
TEMPORARY = ".orbax-checkpoint-tmp"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(RuntimeError):
    """A checkpoint can't be written or read; the message is one line."""


class ArchitectureMismatch(CheckpointError):
    """The checkpoint is intact, but holds another tree than the one asked for."""


class WorkdirInUse(RuntimeError):
    """Another process holds the lock on this workdir."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` found."""

    state: PyTree
    metadata: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and restores the checkpoints of one directory; a context manager.

    directory: created if it doesn't exist. keep: the newest `keep` checkpoints stay on disk.
    read_only: for readers beside a running training; touches nothing on disk. copy: numpy arrays
    are copied before they are written; False where nobody changes them meanwhile and memory is
    short. Raises CheckpointError where the directory can't be written (or read).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        read_only: bool = False,
        copy: bool = True,
    ):
        name = os.fspath(directory)
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self._read_only = read_only
        self._rejected: set[int] = set()
        self._saving: int | None = None  # the step being written in the background
        _silence_orbax()
        if not read_only:
            _check_writable(self.directory)
            for path in self.directory.glob(f"*{TEMPORARY}*"):
                log.warning("removing half-written checkpoint %s", path)
        elif not self.directory.exists():
            raise CheckpointError(f"no checkpoints: {self.directory} does not exist")
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(**({} if copy else _without_copies())),
                "metadata": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            ),
        )

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any] | None = None) -> None:
        """Start to save; returns when `state` may be donated or changed, the rest is asynchronous.

        metadata: what JSON can hold; "step", "versions" and "format" are added. A step that has
        been saved before is left as it is. Raises CheckpointError where this save can't begin or
        the previous one failed.
        """
        self.wait()
        self._set_rejected_aside()
        if step in self._manager.all_steps():
            log.info("step %d has been saved already", step)
            return
        keys, state = _keys_to_data(state)
        extra = {"format": FORMAT, "step": step, "versions": library_versions(), "prng_keys": keys}
        content = {**(metadata or {}), **extra}
        json.dumps(content)  # complain here, not in the background
        try:
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(content)
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Block until the save under way is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def restore(
        self, abstract_state: PyTree | None = None, *, only: Sequence[str] | None = None
    ) -> Restored | None:
        """Restore the latest good checkpoint; None where there is none at all.

        abstract_state: arrays or ShapeDtypeStructs; leaves with a sharding are restored onto it,
        whatever they were saved from, others as numpy. None: nested dicts and lists of numpy.
        only: names of top-level entries to read ("ema_params"); the rest stays on disk.

        Steps that are damaged or not ours are skipped with a logged reason. Raises
        CheckpointError where no step is good, ArchitectureMismatch where a good step holds another
        tree than `abstract_state`.
        """
        self.wait()
        self._manager.reload()
        reasons = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                metadata = self._read_metadata(step)
                saved = self._read_tree(step, only)
                problem = None if abstract_state is None else _difference(abstract_state, saved)
                state = None if problem else self._read_state(step, saved, abstract_state, metadata)
                failure = None
            except Exception as error:
                failure = _reason(error)
            if _any_process(failure is not None):
                reasons.append(f"step {step}: {failure or 'another process could not read it'}")
                log.warning("skipping checkpoint %s, %s", self.directory, reasons[-1])
                self._rejected.add(step)
                continue
            if problem:
                raise ArchitectureMismatch(
                    f"checkpoint {self.directory / str(step)} holds another model: {problem}"
                )
            metadata.pop("prng_keys")
            return Restored(state, metadata, step)
        if reasons:
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}: {'; '.join(reasons)}; "
                "move them away to start afresh"
            )
        return None

    def all_steps(self) -> list[int]:
        """The steps on disk, ascending; some of them may turn out to be damaged."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Wait for the save under way, and free Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return self.close()
        try:
            self.close()
        except CheckpointError as failure:  # don't hide what went wrong first
            log.error("%s", failure)

    def _failed(self, error: Exception) -> CheckpointError:
        """Clean up after a failed save and describe it."""
        step, self._saving = self._saving, None
        if jax.process_index() == 0:  # what was written so far only fills the disk
            for path in self.directory.glob(f"{step}{TEMPORARY}*"):
                # Other files may still be being written; the next start removes those.
                with contextlib.suppress(OSError):
                    path.rmtree()
        self._manager.reload()
        left = self._manager.latest_step()
        kept = "there is no earlier one" if left is None else f"step {left} is still there"
        return CheckpointError(
            f"saving checkpoint {self.directory / str(step)} failed: {_reason(error)}; {kept}"
        )

    def _set_rejected_aside(self) -> None:
        """Rename the steps `restore` has skipped, so that they can be saved again."""
        if not self._rejected:
            return
        if jax.process_index() == 0:
            for step in self._rejected:
                source = self.directory / str(step)
                if source.exists():
                    names = (f"{step}.rejected-{i}" for i in range(1, 1000))
                    free = next(n for n in names if not (self.directory / n).exists())
                    source.rename(self.directory / free)
                    log.warning("renamed damaged checkpoint %s to %s", source, free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set rejected checkpoints aside")
        self._rejected.clear()
        self._manager.reload()

    def _read_metadata(self, step: int) -> dict[str, Any]:
        if not (self.directory / str(step) / "metadata").exists():
            raise CheckpointError("not a checkpoint of this program (no metadata)")
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = self._manager.restore(step, args=args).metadata
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise CheckpointError("not a checkpoint of this program (foreign metadata)")
        return metadata

    def _read_tree(self, step: int, only: Sequence[str] | None) -> PyTree:
        """Shapes and dtypes of the saved state, as nested dicts and lists."""
        found = self._manager.item_metadata(step).state
        tree = getattr(found, "tree", found)
        if tree is None:
            raise CheckpointError("its state can't be read")
        if only is None:
            return tree
        if missing := [name for name in only if name not in tree]:
            raise CheckpointError(f"holds {', '.join(tree)}, not {', '.join(missing)}")
        return {name: tree[name] for name in only}

    def _read_state(
        self, step: int, saved: PyTree, abstract_state: PyTree | None, metadata: dict[str, Any]
    ) -> PyTree:
        impls = metadata["prng_keys"]
        if abstract_state is None:
            item = saved
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        else:
            item = jax.tree.map(_key_as_data, abstract_state)
            restore_args = jax.tree.map(_restore_args, item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state

        def wrap(path: Any, leaf: Any) -> Any:
            impl = impls.get(_path_string(path))
            return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)

        return jax.tree_util.tree_map_with_path(wrap, state)


def _without_copies() -> dict[str, Any]:
    """Options of a handler of numpy trees that reads arrays as it writes them.

    One file an array: Orbax's joint ones are gathered in memory before they are written.
    """
    numpy_only = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False))
    )
    return {"type_handler_registry": numpy_only, "use_ocdbt": False}


# ---------------------------------------------------------------------------- one-shot trees


def save_tree(
    path: str | os.PathLike, tree: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a tree of arrays to one safetensors file, with JSON metadata and its hash.

    Atomic: the file appears under `path` when it is complete, or not at all. In a run of several
    processes, process 0 writes; the arrays must be whole on every process.
    Raises CheckpointError where it can't be written.
    """
    if jax.process_index() != 0:
        return
    flat = dict(_flat_arrays(tree))
    header = {"metadata": json.dumps(dict(metadata or {})), "tree_hash": tree_hash(tree)}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, partial, metadata=header)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"writing {path} failed: {_reason(error)}") from error


def load_tree(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_tree` wrote: (nested dicts of numpy arrays, metadata).

    Tuples, lists and dataclasses come back as dicts keyed by position or field. Raises
    CheckpointError for a missing, damaged or foreign file.
    """
    tree: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                *parents, last = name.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"can't read {path}: {_reason(error)}") from error
    if "tree_hash" not in header:
        raise CheckpointError(f"can't read {path}: not written by this program")
    if tree_hash(tree) != header["tree_hash"]:
        raise CheckpointError(f"can't read {path}: its contents don't match its hash")
    return tree, json.loads(header["metadata"])


def tree_hash(tree: PyTree) -> str:
    """SHA-256 over sorted paths, dtypes, shapes and bytes; containers don't matter, only paths."""
    digest = hashlib.sha256()
    for name, array in sorted(_flat_arrays(tree), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _flat_arrays(tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """('/'-joined path, contiguous numpy array) of every leaf; typed keys as their data."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        # ascontiguousarray would turn a scalar into a vector.
        yield _path_string(path), np.asarray(data, order="C")


# ---------------------------------------------------------------------------- the workdir's lock


class WorkdirLock:
    """Held from `acquire_lock` until `release`, or until the process dies in whatever way."""

    def __init__(self, file: Any = None):
        self._file = file

    def release(self) -> None:
        """Let others have the workdir."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire_lock(workdir: str | os.PathLike) -> WorkdirLock:
    """Make sure that one run at a time trains in `workdir`; process 0 locks for all processes.

    Raises WorkdirInUse with the holder's pid, CheckpointError where the lock can't be written.
    """
    if jax.process_index() != 0 or "://" in os.fspath(workdir):
        return WorkdirLock()  # object stores have no locks
    path = Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"can't write in {workdir}: {_reason(error)}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise WorkdirInUse(f"workdir {workdir} is in use by {holder}; wait or stop it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return WorkdirLock(file)


# ---------------------------------------------------------------------------- details


def library_versions() -> dict[str, str]:
    """Versions of the libraries a checkpoint's contents may depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _path_string(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _keys_to_data(tree: PyTree) -> tuple[dict[str, str], PyTree]:
    """Typed PRNG keys as uint32 arrays, and which of the paths they were, with their kind."""
    impls = {
        _path_string(path): str(jax.random.key_impl(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if _is_key(leaf)
    }
    return impls, jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
    )


def _key_as_data(leaf: Any) -> Any:
    """The ShapeDtypeStruct of what is stored for `leaf`."""
    sharding = getattr(leaf, "sharding", None)
    shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(np.shape(shape), shape.dtype, sharding=sharding)


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(
        sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
    )


def _difference(expected: PyTree, saved: PyTree, shown: int = 3) -> str | None:
    """One line about the paths in which two trees differ; None if they don't."""
    want = _shapes(jax.tree.map(_key_as_data, expected))
    have = _shapes(saved)
    paths = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if not paths:
        return None
    lines = [f"{p}: expected {want.get(p, 'nothing')}, got {have.get(p, 'nothing')}" for p in paths]
    more = f"; and {len(paths) - shown} more" if len(paths) > shown else ""
    return "; ".join(lines[:shown]) + more


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path_string(path): tuple(leaf.shape) for path, leaf in leaves}


def _any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process: all must take the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _check_writable(directory: epath.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if "://" not in str(directory):
            tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise CheckpointError(
            f"can't write checkpoints in {directory}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The gist of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    # TensorStore's messages are pages of specs; the operating system's word on it is at their end.
    if found := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(found[1]))
    first = text.strip().partition("\n")[0] or type(error).__name__
    return first if len(first) <= 200 else first[:200] + "…"


def _silence_orbax() -> None:
    """Keep Orbax's noise about failures off the screen: what matters is raised or logged by us.

    Five threads log a traceback each; and after one failed read or write, TensorStore's others
    find Orbax's event loop closed, which Python reports one by one as unraisable.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") == "without_closed_loops":
        return

    def without_closed_loops(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            hook(args)

    sys.unraisablehook = without_closed_loops


def _not_from_orbax(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":  # tasks and futures "never retrieved"
        return not re.search(r"[/\\]orbax[/\\]|in OCDBT database", record.getMessage())
    return f"{os.sep}orbax{os.sep}" not in record.pathname
