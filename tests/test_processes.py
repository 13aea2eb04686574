"""Runs of several processes, killed runs, runs that go on elsewhere: nothing is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import several
from conftest import FAST_COMPILATION, ROOT

import latent_diffusion as ldm
from latent_diffusion.data import make_source, shards
from latent_diffusion.data.folders import Folder
from latent_diffusion.runtime import partners
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.training import loop

OWN = {"images_per_second", "peak_memory_gib"}  # of the machine, not of the run
DISTANCE = {"eval_fd_alexnet"}
ELASTIC = 1e-5  # of each array's largest value, after a restart on another number of processes


def start_process(*command, devices=8):
    """Python with some CPU devices, its standard error in a pipe."""
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def start_run(workdir, devices=8, num_steps=several.STEPS, **flags):
    """A run as a user starts it."""
    flags |= {"config.num_steps": num_steps, "workdir": workdir}
    words = [f"--{name}={value}" for name, value in flags.items()]
    return start_process("train.py", "--config=tests/several.py", *words, devices=devices)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def wait_for(path, processes):
    """Until something matches a glob pattern in its folder, or a process ends."""
    deadline = time.monotonic() + 900
    while not any(path.parent.glob(path.name)) and all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(processes):
    """Their standard errors; whatever happens, none is left behind."""
    try:
        return [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_here(workdir, **fields):
    return loop.train(several.make_config(**fields), workdir)


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def drawn(workdir):
    return sorted(path.name for path in (workdir / "images").glob("*"))


def start_several(call, workdir, *arguments, devices=4):
    """Two processes that call a function of `several` with a coordinator and their number."""
    coordinator = free_port()
    code = f"import pathlib, several, sys; several.{call}(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); {code}"
    return [
        start_process("-c", code, workdir, coordinator, i, *arguments, devices=devices)
        for i in range(2)
    ]


def assert_same_log(workdir, wanted, but=frozenset()):
    """Every number that two runs have logged, but those of the machine and those of `but`."""
    for want, got in zip(logged(wanted), logged(workdir), strict=True):
        names = want.keys() - OWN - but
        assert names == got.keys() - OWN
        for name in names:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7, err_msg=name)


def saved(workdir):
    """Every array of the last checkpoint by its path."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore()
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Both stages on one process with eight devices, uninterrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    several.train_first_stage(workdir)
    several.train_denoiser(workdir)
    return workdir


@pytest.fixture(scope="module")
def together(whole, tmp_path_factory):
    """What two processes have done, and their standard errors. It shares one start-up."""
    workdir = tmp_path_factory.mktemp("together")
    pictures = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), np.uint8)
    np.savez(workdir / "reference.npz", pictures)
    train_here(workdir / "begun", num_steps=4, **several.LOOKED_AT)
    processes = start_several("main", workdir)
    errors = end(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    return workdir, errors


@pytest.mark.parametrize("mode", ["pmap", "mesh"])
@pytest.mark.parametrize("stage", ["first_stage", "denoiser"])
def test_two_processes_train_both_stages_to_the_end_like_one(stage, mode, together, whole):
    ours, theirs = together[0] / mode / stage, whole / stage
    assert_same_log(ours, theirs)
    assert logged(ours)[-1]["eval_fd_alexnet"] > 0
    assert drawn(ours) == drawn(theirs) != []
    record, want = (json.loads((d / "best" / "best.json").read_text()) for d in (ours, theirs))
    assert record == {**want, "value": pytest.approx(want["value"], rel=1e-5)}
    assert (ours / "best" / "checkpoints" / str(record["step"])).is_dir()
    assert (ours / "checkpoints" / str(logged(ours)[-1]["step"])).is_dir()


def test_two_processes_go_on_with_the_run_of_one(together, whole):
    assert_same_log(together[0] / "begun", whole / "denoiser")


def test_a_signal_to_one_of_two_processes_in_an_evaluation_stops_both(together, whole):
    """Nothing is looked at after the signal; one process makes up for it, in another mode."""
    workdir, errors = together[0] / "stopped", together[1]
    assert ["exit code 143" in error for error in errors] == [True, True]
    assert "stopped by SIGTERM after step 4, saved" in errors[0]
    assert "step" not in errors[1]  # one voice
    assert (workdir / "checkpoints" / "4").is_dir()
    last = logged(workdir)[-1]
    assert last["step"] == 4 and "loss" in last and "eval_loss" not in last
    assert [name[-5:] for name in drawn(workdir)] == ["1.png", "2.png"]
    shutil.copytree(workdir, goes_on := workdir.with_name("goes_on"))
    train_here(goes_on, **{"parallel.mode": "mesh"})
    assert_same_log(goes_on, whole / "denoiser", DISTANCE)
    assert drawn(goes_on) == drawn(whole / "denoiser")


def test_two_processes_sample_and_score_like_one(together):
    """Image i is the same whatever the devices, processes and mode; so is the score."""
    workdir, stopped = together[0], together[0] / "stopped"
    many = np.load(workdir / "samples" / "samples.npz")["arr_0"]
    one = ldm.load(stopped).sample(jax.random.key(0), mode="mesh", **several.SAMPLING)
    assert len(many) == 6 and many.std() > 10
    np.testing.assert_allclose(many.astype(int), to_uint8(one), rtol=0, atol=1)
    each = [np.load(workdir / f"estimates_{process}.npy") for process in (0, 1)]
    np.testing.assert_array_equal(*each)  # of all images, in both
    assert each[0].shape == (4, *one.shape) and np.isfinite(each[0]).all()
    record = json.loads((stopped / "evaluations.jsonl").read_text())  # one voice, again
    shutil.rmtree(stopped / "evaluations")  # the features that they have made
    metrics = several.score(stopped, workdir / "reference.npz")
    assert metrics == pytest.approx(record["metrics"], rel=1e-4)
    assert {"fd_alexnet", "kd_alexnet", "precision_alexnet", "density_alexnet"} < metrics.keys()


def test_processes_with_other_options_neither_sample_nor_score(together):
    workdir, errors = together
    other = "process 1 has another set of options than process 0: seed=1 instead of 0"
    assert errors[1].count(f"refused: {other}") == 2
    assert errors[0].count("refused: the processes of this run don't have the same") == 2
    assert not (workdir / "other").exists()


def test_processes_that_differ_or_are_alone_refuse_to_start(tmp_path):
    def cluster(timeout=200):
        return {"coordinator": free_port(), "num_processes": 2, "connect_timeout": timeout}

    configs, devices, alone = cluster(), cluster(), cluster(2)
    processes = [
        start_run(tmp_path, 1, **configs, process_id=0),
        start_run(tmp_path, 1, **configs, process_id=1, **{"config.batch_size": 16}),
        start_run(tmp_path, 1, **devices, process_id=0),
        start_run(tmp_path, 3, **devices, process_id=1),
        start_run(tmp_path, 1, **alone, process_id=1),
    ]
    errors = end(processes)
    assert [process.returncode for process in processes] == [1] * 5, errors
    assert "error: the processes of this run don't have the same config" in errors[0]
    expected = "process 1 has another config than process 0: batch_size=16 instead of 8"
    assert f"error: {expected}" in errors[1]
    expected = "process 1 has another number of devices than process 0: 3 instead of 1"
    assert [f"error: {expected}" in error for error in errors[2:4]] == [True, True]
    assert f"error: not all processes joined at {alone['coordinator']} in 2 s" in errors[4]
    assert not (tmp_path / "checkpoints").exists()


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(whole, tmp_path, capfd):
    checkpoints = tmp_path / "checkpoints"
    for moment in ("*tmp*", "4"):  # during the first save; among later steps
        process = start_run(tmp_path)
        wait_for(checkpoints / moment, [process])
        process.kill()
        errors = end([process])
        assert process.returncode == -signal.SIGKILL, errors
    train_here(tmp_path)
    assert "resuming from step" in capfd.readouterr().err
    want, got = saved(whole / "denoiser"), saved(tmp_path)
    assert want.keys() == got.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, several.STEPS + 1))


def ended_with_one_line(processes, victim, seconds):
    """The survivor of two processes, some seconds after the other one was killed by itself."""
    processes[victim].wait(900)
    began = time.monotonic()
    errors = end(processes)
    assert time.monotonic() - began < seconds
    codes = [process.returncode for process in processes]
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1), errors
    survivor = errors[1 - victim]
    assert survivor.splitlines()[-1] == partners.MESSAGE
    assert "Traceback" not in survivor and "stack trace" not in survivor, survivor
    return True


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of two processes, of which one died in the evaluation of step 4."""
    workdir = tmp_path_factory.mktemp("killed")
    assert ended_with_one_line(start_several("train_and_die", workdir), 1, partners.TIMEOUT + 10)
    return workdir


@pytest.mark.parametrize("count", [1, 4])
def test_a_run_of_two_processes_goes_on_with_one_or_four(count, killed, whole, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert steps and max(steps) <= 4
    if count == 1:
        train_here(tmp_path)
    else:
        cluster = {"coordinator": free_port(), "num_processes": count}
        processes = [start_run(tmp_path, 2, process_id=i, **cluster) for i in range(count)]
        errors = end(processes)
        assert [process.returncode for process in processes] == [0] * count, errors
        assert "resuming from step" in errors[0]
    want, got = saved(whole / "denoiser"), saved(tmp_path)
    assert want.keys() == got.keys()
    worst = max(deviation(want[path], got[path]) for path in want)
    assert worst < ELASTIC


def test_two_processes_encode_are_killed_go_on_and_train_like_one(whole, tmp_path):
    """Each on shards of its own; those that were whole aren't made again."""
    folder = tmp_path / "latents" / "train"
    killed = start_several("encode_and_train", tmp_path, 150)  # in the third of four shards
    end(killed)
    assert [process.returncode for process in killed] == [-signal.SIGKILL] * 2
    names = [f"{number:05d}.array_record" for number in range(8)]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*")}
    assert sorted(before) == names[:4] and not (tmp_path / "denoiser").exists()
    processes = start_several("encode_and_train", tmp_path, -1)
    errors = end(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert ["picture 120/120" in error for error in errors] == [True, False]  # one voice
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert sorted(after) == names and before.items() <= after.items()
    source = shards.ShardSource(Folder(folder))
    pictures = make_source(several.make_config().data, "train")
    for i in range(len(pictures)):
        (mirror,) = source[i]["crops"][0]["mirrors"]
        want = pictures[i]["image"] / np.float32(127.5) - 1
        np.testing.assert_allclose(mirror["moments"][..., :3], want, atol=1e-6)
    assert len(source) == len(pictures) == 480
    got, want = ([row["loss"] for row in logged(d / "denoiser")] for d in (tmp_path, whole))
    np.testing.assert_allclose(got, want[:3], rtol=1e-5)


def deviation(want, got):
    """The largest difference of two arrays, as a part of the largest value."""
    want, got = (np.asarray(x, np.float64) for x in (want, got))
    return np.max(np.abs(want - got), initial=0) / (np.max(np.abs(want), initial=0) or 1)


@pytest.mark.parametrize(("victim", "place"), [(0, "busy"), (1, "save"), (1, "barrier")])
def test_a_process_ends_with_one_line_when_its_partner_dies(victim, place, tmp_path):
    processes = start_several("die_at", tmp_path, victim, place, devices=1)
    assert ended_with_one_line(processes, victim, several.DEATH + 10)
