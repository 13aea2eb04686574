"""Whatever happens to a save, a restart finds the last good state; and says what it skipped."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from latent_diffusion.files.tensor import Tensor
from latent_diffusion.runtime import checkpoint, parallel, workdir
from latent_diffusion.runtime.checkpoint import (
    ArchitectureMismatch,
    Checkpointer,
    CheckpointError,
    WorkdirInUse,
    integrity,
)

MESH_RULES = ((".*", "fsdp(min_mb=0)"),)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    rng: jax.Array
    extra: dict | None = None


def make_state(seed=0, width=8):
    kernel = np.random.default_rng(seed).normal(size=(width, 16)).astype(np.float32)
    params = {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(16, jnp.bfloat16) * seed}}
    opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    return State(jnp.int32(seed), params, opt_state, jax.random.key(seed))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(directory, *steps, keep=3):
    with Checkpointer(directory, keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"data_position": step * 10})


@contextlib.contextmanager
def full_disk():
    """Every file ends at 2 kB, as if the disk were full: what a write then raises is an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---------------------------------------------------------------------------- good weather


def test_round_trip_with_metadata_and_keep(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == [3, 4]
        restored = checkpointer.restore(jax.eval_shape(make_state))
    assert restored.step == 4
    assert_same(make_state(4), restored.state)
    assert restored.metadata["data_position"] == 40
    assert restored.metadata["step"] == 4
    assert restored.metadata["versions"]["jax"] == jax.__version__


def test_empty_directory_restores_nothing(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(make_state()) is None


def test_without_a_target_nested_numpy(tmp_path):
    save_steps(tmp_path, 5)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        state = checkpointer.restore().state
        params = checkpointer.restore(only=("params",)).state
    expected = make_state(5).params["dense"]["kernel"]
    assert isinstance(state["params"]["dense"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(state["params"]["dense"]["kernel"], expected)
    assert jax.random.key_data(state["rng"]).tolist() == [0, 5]
    assert list(params) == ["params"]
    np.testing.assert_array_equal(params["params"]["dense"]["kernel"], expected)


def test_part_of_a_state_with_a_target(tmp_path):
    save_steps(tmp_path, 5)
    target = {"params": make_state().params}
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert_same(
            {"params": make_state(5).params}, checkpointer.restore(target, only=("params",)).state
        )
        with pytest.raises(CheckpointError, match=r"holds .*params.* not ema_params"):
            checkpointer.restore(only=("ema_params",))


WHERE = {
    "single": ("single", None, ()),
    "pmap": ("pmap", None, ()),
    "mesh": ("mesh", {"data": 2, "fsdp": 4}, MESH_RULES),
}


@pytest.mark.parametrize("target", WHERE)
@pytest.mark.parametrize("source", WHERE)
def test_restores_onto_other_devices(tmp_path, source, target):
    def where(name):
        mode, sizes, rules = WHERE[name]
        return mode, parallel.make_mesh(sizes) if sizes else None, rules

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, parallel.place(make_state(7), *where(source)))
        wanted = parallel.abstract(jax.eval_shape(make_state), *where(target))
        state = checkpointer.restore(wanted).state
    assert_same(make_state(7), state)
    for want, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(state), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_state_may_be_donated_while_it_is_saved(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"w": jnp.zeros((256, 256)), "b": jnp.zeros(3)}
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        for step in range(4):
            checkpointer.save(step, tree)
            tree = bump(bump(tree))
        checkpointer.wait()
        for step in (3, 2, 1, 0):
            assert checkpointer.restore().state["w"].flat[0] == 2 * step
            shutil.rmtree(tmp_path / str(step))


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, make_state(3))
        checkpointer.save(3, make_state(4))
        assert_same(make_state(3), checkpointer.restore(make_state()).state)


def test_metadata_must_be_json_and_says_so_at_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, make_state(), {"config": object()})


# ---------------------------------------------------------------------------- damage


def truncate(step):
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)


def drop_arrays(step):
    for path in (step / "state").rglob("d"):
        shutil.rmtree(path)


def drop_tree(step):
    (step / "state" / "_METADATA").unlink()


def drop_metadata(step):
    shutil.rmtree(step / "metadata")


def garble_metadata(step):
    (step / "metadata" / "metadata").write_text('{"format": "lat')


def other_program(step):
    (step / "metadata" / "metadata").write_text(json.dumps({"format": "something else"}))


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = [truncate, drop_arrays, drop_tree, drop_metadata, garble_metadata, other_program, empty]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("target", ["abstract", "none"])
def test_damaged_step_is_skipped_named_and_can_be_saved_again(tmp_path, caplog, damage, target):
    abstract = jax.eval_shape(make_state) if target == "abstract" else None
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.restore(abstract).step == 1
        assert (tmp_path / "2").exists()  # looking changes nothing
        message = next(r.message for r in caplog.records if "skipping" in r.message)
        assert "step 2" in message and "\n" not in message
        checkpointer.save(2, make_state(2))
        restored = checkpointer.restore(jax.eval_shape(make_state))
        assert restored.step == 2
        assert_same(make_state(2), restored.state)
        assert checkpointer.all_steps() == [1, 2]
        checkpointer.save(3, make_state(3))  # the step that was saved again is good, and stays
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 3]
    assert [path.name for path in tmp_path.glob("*rejected*")] == ["2.rejected-1"]


def test_all_damaged_steps_after_the_last_good_one_are_saved_again(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    for step in "23":
        drop_tree(tmp_path / step)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore().step == 1
        for step in (2, 3):
            checkpointer.save(step, make_state(step))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        restored = checkpointer.restore(jax.eval_shape(make_state))
        assert restored.step == 3 and checkpointer.all_steps() == [1, 2, 3]
        assert_same(make_state(3), restored.state)
    rejected = sorted(path.name for path in tmp_path.glob("*rejected*"))
    assert rejected == ["2.rejected-1", "3.rejected-1"]


def test_no_flipped_bit_is_restored(tmp_path, caplog):
    save_steps(tmp_path / "run", 1, 2)
    files = sorted(path for path in (tmp_path / "run" / "2").rglob("*") if path.is_file())
    rng, noticed = np.random.default_rng(0), 0
    for trial in range(24):
        copy = shutil.copytree(tmp_path / "run", tmp_path / str(trial))
        path = copy / files[trial % len(files)].relative_to(tmp_path / "run")
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with Checkpointer(copy, read_only=True) as checkpointer:
            restored = checkpointer.restore(jax.eval_shape(make_state))
        assert_same(make_state(restored.step), restored.state)
        noticed += restored.step == 1
        assert ("going on from the last good checkpoint, step 1" in caplog.text) == (noticed > 0)
    assert noticed > 5  # the others changed what nobody reads


def test_a_flipped_bit_is_noticed_in_an_entry_that_is_read_array_by_array(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    read = Checkpointer._read_state

    def read_other_values(*given):
        return jax.tree.map(lambda x: np.asarray(x) + 1, read(*given))

    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        kernel = checkpoints.open("params")["dense"]["kernel"]
        np.testing.assert_array_equal(kernel.read(), make_state(1).params["dense"]["kernel"])
    monkeypatch.setattr(Checkpointer, "_read_state", read_other_values)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        kernel = checkpoints.open("params")["dense"]["kernel"]
        with pytest.raises(CheckpointError):
            kernel.read()


def test_a_workdir_whose_checkpoints_are_all_half_written_or_rejected_has_no_run(tmp_path):
    workdir.save_config(ConfigDict({"seed": 3}), tmp_path)
    for name in ("7.rejected-1", "8.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert workdir.load_run(tmp_path) is None
    (tmp_path / "checkpoints" / "6").mkdir()
    assert workdir.load_run(tmp_path).seed == 3


def test_trees_larger_than_memory_are_written_and_read_array_by_array(tmp_path, monkeypatch):
    alive, most = set(), []

    def lazy(i):
        def read():
            array = np.full((3, 5), i, np.float32)
            alive.add(i)
            weakref.finalize(array, alive.discard, i)
            most.append(len(alive))
            return array

        return Tensor((3, 5), np.dtype(np.float32), read)

    tree = {"params": {"net": {f"layer_{i}": {"kernel": lazy(i)} for i in range(12)}}, "more": {}}
    with Checkpointer(tmp_path, lazy=True) as checkpointer:
        checkpointer.save(0, tree)
    assert len(most) == 24 and max(most) <= 2  # once for the fingerprint, once for the file

    monkeypatch.setattr("latent_diffusion.runtime.checkpoint.checkpointer.GROUP", 4 * 15 * 4)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        whole = checkpointer.restore().state["params"]["net"]
        layers = checkpointer.open("params")["net"]
        assert layers.keys() == whole.keys()
        for name, layer in layers.items():
            assert layer["kernel"].shape == (3, 5)
            np.testing.assert_array_equal(layer["kernel"].read(), whole[name]["kernel"])
        with pytest.raises(CheckpointError, match="holds more, params, not ema_params"):
            checkpointer.open("ema_params")
        (file,) = (f for f in (tmp_path / "0" / "state").rglob("*layer_7*/0.0"))
        file.write_bytes(file.read_bytes()[:-1])
        assert layers["layer_0"]["kernel"].read().max() == 0  # of another group
        with pytest.raises(CheckpointError, match=f"can't read {tmp_path / '0'}: "):
            layers["layer_7"]["kernel"].read()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float64", "int8", "bool", "uint32", "int64"]
)
def test_fingerprints_see_every_bit_and_no_layout(dtype):
    array = np.random.default_rng(0).normal(size=(6, 8)).astype(jnp.dtype(dtype))
    with jax.enable_x64(dtype.endswith("64")):
        mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
        cut = jax.device_put(array, jax.sharding.NamedSharding(mesh, P("data", "fsdp")))
        assert int(integrity._device_sum(cut)) == integrity._host_sum(array)
    assert integrity.fingerprints({"a": array}) == integrity.fingerprints({"a": cut})
    changed = array.copy()
    changed.reshape(-1).view(np.uint8)[17] ^= 1
    assert integrity._host_sum(changed) != integrity._host_sum(array)
    assert integrity._host_sum(np.zeros((0, 3), array.dtype)) == 0


def test_nothing_good_is_an_error(tmp_path):
    save_steps(tmp_path, 1, 2)
    truncate(tmp_path / "1")
    drop_metadata(tmp_path / "2")
    none_left = pytest.raises(CheckpointError, match=r"no usable checkpoint.*step 2: .*step 1: ")
    with Checkpointer(tmp_path) as checkpointer, none_left:
        checkpointer.restore(jax.eval_shape(make_state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: make_state(width=4), ["params/dense/kernel: expected (4, 16), got (8, 16)"]),
        (lambda s: s.replace(extra={"w": jnp.ones(2)}), ["extra/w: expected (2,), got nothing"]),
        (lambda s: s.replace(params={}), ["params/dense/bias: expected nothing, got (16,)"]),
    ],
)
def test_another_architecture_is_one_error_not_a_fallback(tmp_path, change, words):
    save_steps(tmp_path, 1, 2)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ArchitectureMismatch) as caught:
        checkpointer.restore(change(make_state()))
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


# ---------------------------------------------------------------------------- failing saves


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "close"])
def test_full_disk_loses_nothing_and_is_told_once(tmp_path, surfaces_at):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, make_state(1, width=64))
    checkpointer.wait()
    message = r"/2 failed: File too large; step 1 is still there"
    with pytest.raises(CheckpointError, match=message), full_disk():
        checkpointer.save(2, make_state(2, width=64))
        if surfaces_at == "save":
            checkpointer.save(3, make_state(3, width=64))
        else:
            getattr(checkpointer, surfaces_at)()
    with Checkpointer(tmp_path, keep=1) as again:
        assert again.restore(make_state(width=64)).step == 1
        again.save(2, make_state(2, width=64))
        assert again.restore(make_state(width=64)).step == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]
    if surfaces_at != "close":
        checkpointer.close()


def test_the_same_checkpointer_goes_on_after_a_failed_save(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1, width=64))
        checkpointer.wait()
        with full_disk(), pytest.raises(CheckpointError):
            checkpointer.save(2, make_state(2, width=64))
            checkpointer.wait()
        checkpointer.save(2, make_state(2, width=64))
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]


def test_an_error_in_the_block_is_not_hidden_by_a_failing_save(tmp_path, caplog):
    first = pytest.raises(KeyError, match="first")
    with first, full_disk(), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2, width=64))
        raise KeyError("first")
    assert "File too large" in caplog.text


def test_unwritable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't write checkpoints in .*: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpointer(tmp_path / "nowhere", read_only=True)


@pytest.mark.parametrize("name", ["lr[0.1]", "back\\slash"])
def test_a_path_that_orbax_can_not_read_again_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"its path may not have \[ \] or a backslash$"):
        Checkpointer(tmp_path / name / "checkpoints")
    assert not any(tmp_path.iterdir())


def test_other_odd_paths_are_read_again(tmp_path):
    directory = tmp_path / "50 %, a[b" / "ü#1 {x}?"
    save_steps(directory, 1)
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.restore(jax.eval_shape(make_state)).step == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpointer(tmp_path)


CHILD = """
    import sys
    sys.path.insert(0, {tests!r})
    import conftest
    import jax, jax.numpy as jnp
    from latent_diffusion.runtime.checkpoint import Checkpointer, acquire_lock
    lock = acquire_lock({workdir!r})
    checkpointer = Checkpointer({workdir!r} + "/checkpoints", keep=1)
    for step in range(1, 10_000):
        checkpointer.save(step, {{"w": jnp.full((400, 1000), step)}})
        print(step, flush=True)
"""


def test_kill_9_during_a_save_and_the_lock_dies_with_the_process(tmp_path):
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), workdir=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        started = [int(child.stdout.readline()) for _ in range(3)][-1]
        with pytest.raises(WorkdirInUse, match=f"process {child.pid} on "):
            checkpoint.acquire_lock(tmp_path)
        child.send_signal(signal.SIGKILL)  # save 3 has begun, saves 1 and 2 are complete
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with checkpoint.acquire_lock(tmp_path), Checkpointer(tmp_path / "checkpoints") as checkpointer:
        restored = checkpointer.restore()
    assert restored.step >= started - 1
    assert np.unique(restored.state["w"]).tolist() == [restored.step]


def test_lock_is_given_back(tmp_path):
    refused = pytest.raises(WorkdirInUse, match=f"process {os.getpid()}")
    with checkpoint.acquire_lock(tmp_path), refused:
        checkpoint.acquire_lock(tmp_path)
    checkpoint.acquire_lock(tmp_path).release()


def test_the_holder_of_a_lock_is_named_alone(tmp_path):
    """Not with a process that was killed while it held the lock."""
    (tmp_path / ".lock").write_text("process 1 on a machine of yesterday\n")
    with checkpoint.acquire_lock(tmp_path), pytest.raises(WorkdirInUse) as refusal:
        checkpoint.acquire_lock(tmp_path)
    assert f"in use by process {os.getpid()} on" in str(refusal.value)
    assert "yesterday" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*given):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with checkpoint.acquire_lock(tmp_path):
        assert f"{tmp_path / '.lock'} can't be locked (Function not impl" in caplog.text


# ---------------------------------------------------------------------------- one-shot trees

TREE = {
    "encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": np.float32(0.5)},
    "bf16": jnp.asarray([1.5, -2], jnp.bfloat16),
    "layers": [np.ones(2, np.int32), np.zeros((0, 3), np.float32)],
}


def test_tree_round_trip(tmp_path):
    path = tmp_path / "deep" / "first_stage.safetensors"
    checkpoint.save_tree(path, TREE, {"scale_factor": 0.18})
    tree, metadata = checkpoint.load_tree(path)
    assert metadata == {"scale_factor": 0.18}
    assert list(tree["layers"]) == ["0", "1"]
    assert tree["bf16"].dtype == jnp.bfloat16 and tree["encoder"]["scale"].shape == ()
    np.testing.assert_array_equal(tree["encoder"]["kernel"], TREE["encoder"]["kernel"])
    assert checkpoint.tree_hash(tree) == checkpoint.tree_hash(TREE)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tree_hash_sees_values_shapes_dtypes_and_paths():
    a = np.arange(4, dtype=np.float32)
    others = [{"a": a + 1}, {"b": a}, {"a": a.reshape(2, 2)}, {"a": a.astype(np.float64)}]
    others += [{"a": a.view(np.int32)}, {"a": a, "b": a}]
    hashes = {checkpoint.tree_hash(tree) for tree in [{"a": a}, *others]}
    assert len(hashes) == 7
    assert checkpoint.tree_hash({"a": jnp.asarray(a)}) == checkpoint.tree_hash({"a": a})


def test_failed_tree_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "tree.safetensors"
    checkpoint.save_tree(path, TREE)
    with full_disk(), pytest.raises(CheckpointError, match=r"tree.safetensors failed: "):
        checkpoint.save_tree(path, {"w": np.ones(10_000)})
    assert "encoder" in checkpoint.load_tree(path)[0]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "foreign"])
def test_bad_tree_file_is_one_line(tmp_path, damage):
    path = tmp_path / "tree.safetensors"
    if damage != "missing":
        checkpoint.save_tree(path, TREE)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        if damage == "truncated":
            content = content[:-3]
        if damage == "foreign":
            content = b"hello"
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"can't read .*tree.safetensors: ") as caught:
        checkpoint.load_tree(path)
    assert "\n" not in str(caught.value)
