"""Checkpoints of a run, by Orbax."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.core.trees import difference
from latent_diffusion.core.types import PyTree
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.runtime import partners, processes
from latent_diffusion.runtime.checkpoint import integrity
from latent_diffusion.runtime.checkpoint.errors import (
    ArchitectureMismatch,
    CheckpointError,
    reason,
    silence_orbax,
)
from latent_diffusion.runtime.checkpoint.handlers import grouped, lazy_handler, state_handler
from latent_diffusion.runtime.checkpoint.leaves import (
    as_keys,
    key_as_data,
    keys_to_data,
)

log = logging.getLogger(__name__)

FORMAT = "latent_diffusion"  # marks checkpoints of this package
GROUP = 1 << 27  # bytes that `open` reads at a time
TEMPORARY = ".orbax-checkpoint-tmp"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")

_CHECKPOINTERS: weakref.WeakSet["Checkpointer"] = weakref.WeakSet()


class Restored(NamedTuple):
    """The result of `Checkpointer.restore`."""

    state: PyTree
    metadata: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and restores the checkpoints of one directory; a context manager.

    directory: created if it doesn't exist. keep: number of newest checkpoints that stay on disk;
    None keeps all.
    read_only: for readers beside a running training; changes nothing on disk. lazy: save trees of
    `Tensor` leaf by leaf. Raises CheckpointError where the directory can't be written (or read).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int | None = 3,
        read_only: bool = False,
        lazy: bool = False,
    ):
        name = os.fspath(directory)
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self._rejected: set[int] = set()
        self._saving: int | None = None  # the step being written in the background
        _CHECKPOINTERS.add(self)
        silence_orbax()
        if not read_only:
            _check_writable(self.directory)
            for path in self.directory.glob(f"*{TEMPORARY}*"):
                log.warning("removing half-written checkpoint %s", path)
        elif not self.directory.exists():
            raise CheckpointError(f"no checkpoints: {self.directory} does not exist")
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": lazy_handler() if lazy else state_handler(),
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
        """Start to save asynchronously; returns when `state` may be donated or changed.

        metadata: JSON values; "step", "versions" and "format" are added. A step that is already on
        disk is not saved again. Raises CheckpointError where this save can't begin or the previous
        save failed.
        """
        self.wait()
        # Processes synchronise a save under a name that all Orbax managers share.
        for other in _CHECKPOINTERS if jax.process_count() > 1 else ():
            if other._saving is not None:
                other.wait()
        self._set_rejected_aside()
        if step in self._manager.all_steps():
            log.info("step %d has been saved already", step)
            return
        keys, state = keys_to_data(state)
        content = {
            **(metadata or {}),
            "format": FORMAT,
            "step": step,
            "versions": library_versions(),
            "prng_keys": keys,
            "fingerprints": integrity.fingerprints(state),
        }
        content["digest"] = _digest(content)  # raises TypeError for values that aren't JSON
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

    def drop_after(self, step: int) -> None:
        """Delete checkpoints of later steps, which a run that goes on from `step` takes anew."""
        self.wait()
        later = [saved for saved in self.all_steps() if saved > step]
        processes.barrier("all have listed the checkpoints")
        for number in later:
            where = self.directory / str(number)
            log.info("removing %s: the run goes on from step %d", where, step)
            self._manager.delete(number)
        processes.barrier("later checkpoints are gone")

    def wait(self) -> None:
        """Wait until the current save is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def restore(
        self,
        abstract_state: PyTree | None = None,
        *,
        only: Sequence[str] | None = None,
        step: int | None = None,
    ) -> Restored | None:
        """Restore the latest good checkpoint; None where there are no checkpoints at all.

        abstract_state: arrays or ShapeDtypeStructs. Leaves with a sharding are restored with it,
        others as numpy arrays. None: restore nested dicts and lists of numpy arrays.
        only: names of top-level entries to read ("ema_params"); the rest stays on disk.
        step: a step to restore, good or not, in place of the latest good one.

        Steps that are damaged or from other programs are skipped with a logged reason. Raises
        CheckpointError where no step is good, ArchitectureMismatch where a good step has another
        tree than `abstract_state`.
        """
        self.wait()
        if step is not None:
            return self._restore_step(step, abstract_state, only)
        return self._of_latest(lambda step: self._restore_step(step, abstract_state, only))

    def open(self, entry: str) -> PyTree | None:
        """A top-level entry of the latest checkpoint, nested dicts of `Tensor`; None without any.

        Leaves are read in groups of GROUP bytes, and the latest group stays in memory: read them in
        the tree's order, and before the checkpointer is closed. Steps whose description can't be
        read are skipped, as in `restore`. Reading a damaged leaf raises CheckpointError, since then
        it is too late to choose another step.
        """
        return self._of_latest(lambda step: self._open_step(step, entry))

    def _of_latest(self, read: Callable[[int], Any]) -> Any:
        """`read(step)` for the latest step that can be read; None where there is no step."""
        reasons = []
        for step in reversed(self.all_steps()):
            try:
                result = read(step)
            except ArchitectureMismatch:
                raise
            except CheckpointError as error:
                reasons.append(f"step {step}: {error}")
                log.warning("skipping checkpoint %s, %s", self.directory, reasons[-1])
                self._rejected.add(step)
                continue
            if reasons:
                log.warning("going on from the last good checkpoint, step %d", step)
            return result
        if reasons:
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}: {'; '.join(reasons)}; "
                "move them away to start afresh"
            )
        return None

    def _open_step(self, step: int, entry: str) -> PyTree:
        with self._reading(step):
            fingerprints = self._read_metadata(step).get("fingerprints", {})
            saved = self._read_tree(step, [entry])
            if fingerprints:
                integrity.check_kinds(saved, fingerprints, [entry])
        flat = flatten_dict(saved)
        paths, groups = list(flat), grouped(list(flat.values()), GROUP)

        latest: dict[range, Mapping[Any, np.ndarray]] = {}

        def read(group: range) -> Mapping[Any, np.ndarray]:
            if group not in latest:
                latest.clear()  # before the next group needs its memory
                part = {path: flat[path] for path in paths[group.start : group.stop]}
                with self._reading(step):
                    state = self._read_state(step, unflatten_dict(part), None)
                    if fingerprints:
                        integrity.check_values(state, fingerprints)
                latest[group] = flatten_dict(state)
            return latest[group]

        def leaf(path: Any, group: range) -> Tensor:
            shape, dtype = tuple(flat[path].shape), np.dtype(flat[path].dtype)
            return Tensor(shape, dtype, lambda: read(group)[path])

        leaves = {paths[i]: leaf(paths[i], group) for group in groups for i in group}
        return unflatten_dict(leaves)[entry]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turn every exception into a CheckpointError that names the step's folder."""
        try:
            yield
        except Exception as error:
            where = self.directory / str(step)
            raise CheckpointError(f"can't read {where}: {reason(error)}") from error

    def metadata(self) -> dict[str, Any] | None:
        """The metadata of the latest checkpoint; None where no checkpoint can be read."""
        for step in reversed(self.all_steps()):
            with contextlib.suppress(CheckpointError), self._reading(step):
                return self._read_metadata(step)
        return None

    def all_steps(self) -> list[int]:
        """The steps on disk, ascending; some of them may be damaged."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Wait for the current save, and free Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return self.close()
        if jax.process_count() > 1 and partners.is_death(error):
            return None  # the current save would wait for a dead process
        try:
            self.close()
        except CheckpointError as failure:  # don't hide the first error
            log.error("%s", failure)

    def _failed(self, error: Exception) -> CheckpointError:
        """Clean up after a failed save; returns an error that describes it."""
        step, self._saving = self._saving, None
        if jax.process_index() == 0:  # an incomplete checkpoint only takes disk space
            for path in self.directory.glob(f"{step}{TEMPORARY}*"):
                # Threads may still write other files; the next start removes them.
                with contextlib.suppress(OSError):
                    path.rmtree()
        self._manager.reload()
        left = self._manager.latest_step()
        hint = "there is no earlier one" if left is None else f"step {left} is still there"
        return CheckpointError(
            f"saving checkpoint {self.directory / str(step)} failed: {reason(error)}; {hint}"
        )

    def _set_rejected_aside(self) -> None:
        """Rename the steps that `restore` has skipped, so that they can be saved again."""
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
        processes.barrier("set rejected checkpoints aside")
        self._rejected.clear()
        self._manager.reload()

    def _restore_step(
        self, step: int, abstract_state: PyTree | None, only: Sequence[str] | None
    ) -> Restored:
        """Restore one step; CheckpointError on all processes if any of them can't read it."""
        problem = failure = None
        try:
            metadata = self._read_metadata(step)
            saved = self._read_tree(step, only)
            if fingerprints := metadata.pop("fingerprints", None):
                integrity.check_kinds(saved, fingerprints, only)
            if abstract_state is not None:
                problem = difference(jax.tree.map(key_as_data, abstract_state), saved)
            state = None if problem else self._read_state(step, saved, abstract_state)
        except Exception as error:
            failure = reason(error)
        if processes.any_process(failure is not None):
            raise CheckpointError(failure or "another process could not read it")
        if problem:
            raise ArchitectureMismatch(
                f"checkpoint {self.directory / str(step)} holds another model: {problem}"
            )
        if fingerprints:  # all processes compute the sums together
            integrity.check_values(state, fingerprints)
        return Restored(as_keys(state, metadata.pop("prng_keys")), metadata, step)

    def _read_metadata(self, step: int) -> dict[str, Any]:
        if not (self.directory / str(step) / "metadata").exists():
            raise CheckpointError("not a checkpoint of this program (no metadata)")
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = self._manager.restore(step, args=args).metadata
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise CheckpointError("not a checkpoint of this program (foreign metadata)")
        if metadata.pop("digest", None) not in (None, _digest(metadata)):
            raise CheckpointError("its metadata is damaged")
        return metadata

    def _read_tree(self, step: int, only: Sequence[str] | None) -> PyTree:
        """Shapes and dtypes of the saved state, as nested dicts and lists."""
        metadata = self._manager.item_metadata(step).state
        tree = getattr(metadata, "tree", metadata)
        if tree is None:
            raise CheckpointError("its state can't be read")
        if only is None:
            return tree
        if missing := [name for name in only if name not in tree]:
            raise CheckpointError(f"holds {', '.join(tree)}, not {', '.join(missing)}")
        return {name: tree[name] for name in only}

    def _read_state(self, step: int, saved: PyTree, abstract_state: PyTree | None) -> PyTree:
        """The arrays of the state; PRNG keys are plain arrays."""
        if abstract_state is None:
            item = saved
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        else:
            item = jax.tree.map(key_as_data, abstract_state)
            restore_args = jax.tree.map(_restore_args, item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=args)).state


def library_versions() -> dict[str, str]:
    """Versions of the libraries on which a checkpoint's contents may depend."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _digest(metadata: Mapping[str, Any]) -> str:
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_writable(directory: epath.Path) -> None:
    if re.search(r"\[[^/]+\]|\\", str(directory)):  # Orbax would write there what it can't find
        raise CheckpointError(
            f"can't write checkpoints in {directory}: its path may not have [ ] or a backslash"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if "://" not in str(directory):
            tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise CheckpointError(f"can't write checkpoints in {directory}: {reason(error)}") from error


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(
        sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
    )
