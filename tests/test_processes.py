"""Runs of several processes, killed runs, runs that go on elsewhere: nothing is lost."""

import json
import os
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
from latent_diffusion.runtime import partners
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.training import loop

OWN = {"images_per_second", "peak_memory_gib"}  # of the machine, not of the run


def start_process(*command, devices=8):
    """Python with some CPU devices, its standard error in a pipe."""
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def start_run(workdir, devices=8, num_steps=several.STEPS, **flags):
    """A run as a user starts it."""
    flags |= {f"config.{name}": value for name, value in several.FIELDS.items()}
    flags |= {"config.num_steps": num_steps, "workdir": workdir}
    words = [f"--{name}={value}" for name, value in flags.items()]
    config = "--config=configs/openmoji_text.py:smoke"
    return start_process("train.py", config, *words, devices=devices)


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


def start_several(call, *arguments, count=2):
    """Processes that call a function of `several` with a coordinator and their number."""
    coordinator, devices = free_port(), 8 // count
    code = f"import pathlib, several, sys; several.{call}(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); {code}"
    workdir, *rest = arguments
    return [
        start_process("-c", code, workdir, coordinator, i, *rest, devices=devices)
        for i in range(count)
    ]


def assert_same_log(workdir, wanted):
    """Every number that two runs have logged, but those of the machine."""
    for want, got in zip(logged(wanted), logged(workdir), strict=True):
        assert want.keys() - OWN == got.keys() - OWN
        for name in want.keys() - OWN:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on eight devices: its workdir and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.tree.map(np.asarray, train_here(workdir))


def test_two_processes_train_sample_and_score_like_one_and_go_on_as_one(whole, tmp_path):
    processes = start_several("main", tmp_path)
    wait_for(tmp_path / "config.json", processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is preempted
    errors = end(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert ["exit code 143" in error for error in errors] == [True, True]
    assert "stopped by SIGTERM after step" in errors[0]
    assert "step" not in errors[1]  # one voice
    # Neither samples nor scores what the processes were told differently.
    other = "process 1 has another set of options than process 0: seed=1 instead of 0"
    assert errors[1].count(f"refused: {other}") == 2
    assert errors[0].count("refused: the processes of this run don't have the same") == 2
    assert not (tmp_path / "other").exists()
    last = logged(tmp_path)[-1]["step"]
    assert 1 <= last < several.STEPS
    assert (tmp_path / "checkpoints" / str(last)).is_dir()

    # Image i is the same whatever the devices, processes and mode; so is the score.
    many = np.load(tmp_path / "samples" / "samples.npz")["arr_0"]
    one = ldm.load(tmp_path).sample(jax.random.key(0), mode="mesh", **several.SAMPLING)
    assert len(many) == 6 and many.std() > 10
    np.testing.assert_allclose(many.astype(int), to_uint8(one), rtol=0, atol=1)
    record = json.loads((tmp_path / "evaluations.jsonl").read_text())  # one voice, again
    assert several.score(tmp_path) == pytest.approx(record["metrics"], rel=1e-4)

    train_here(tmp_path, **{"parallel.mode": "mesh"})
    assert_same_log(tmp_path, whole[0])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Both stages on one process."""
    workdir = tmp_path_factory.mktemp("both")
    several.train_both(workdir)
    return workdir


@pytest.mark.parametrize("mode", ["pmap"])
def test_two_processes_train_both_stages_to_the_end_like_one(mode, both, whole, tmp_path):
    train_here(tmp_path / "begun", num_steps=4)
    processes = start_several("main_both", tmp_path, mode)
    errors = end(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    for stage in ("first_stage", "denoiser"):
        assert_same_log(tmp_path / stage, both / stage)
        assert logged(tmp_path / stage)[-1]["eval_fd_alexnet"] > 0
        pictures = [
            sorted(p.name for p in (d / stage / "images").glob("*")) for d in (tmp_path, both)
        ]
        assert pictures[0] == pictures[1] != []
        record, want = (
            json.loads((d / stage / "best" / "best.json").read_text()) for d in (tmp_path, both)
        )
        assert record == {**want, "value": pytest.approx(want["value"], rel=1e-5)}
        assert (tmp_path / stage / "best" / "checkpoints" / str(record["step"])).is_dir()
    assert (tmp_path / "denoiser" / "checkpoints" / str(several.STEPS)).is_dir()
    assert_same_log(tmp_path / "begun", whole[0])


def test_processes_with_other_configs_or_alone_refuse_to_start(tmp_path):
    cluster = {"coordinator": free_port(), "num_processes": 2, "connect_timeout": 200}
    processes = [
        start_run(tmp_path, 4, **cluster, process_id=0),
        start_run(tmp_path, 4, **cluster, process_id=1, **{"config.batch_size": 16}),
    ]
    alone = cluster | {"coordinator": free_port(), "connect_timeout": 2}
    processes.append(start_run(tmp_path, 4, **alone, process_id=1))
    errors = end(processes)
    assert [process.returncode for process in processes] == [1, 1, 1], errors
    assert "error: the processes of this run don't have the same config" in errors[0]
    expected = "process 1 has another config than process 0: batch_size=16 instead of 8"
    assert f"error: {expected}" in errors[1]
    assert f"error: not all processes joined at {alone['coordinator']} in 2 s" in errors[2]
    assert not (tmp_path / "checkpoints").exists()


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(whole, tmp_path, capfd):
    checkpoints = tmp_path / "checkpoints"
    for moment in ("*tmp*", "4"):  # during the first save; among later steps
        process = start_run(tmp_path)
        wait_for(checkpoints / moment, [process])
        process.kill()
        errors = end([process])
        assert process.returncode == -signal.SIGKILL, errors
    state = train_here(tmp_path)
    assert "resuming from step" in capfd.readouterr().err
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, several.STEPS + 1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_ends_with_one_line_when_its_partner_dies(victim, whole, tmp_path):
    cluster = {"coordinator": free_port(), "num_processes": 2}
    flags = {"config.checkpoint.every_steps": 2}
    processes = [
        start_run(tmp_path, 4, 100_000, process_id=i, **cluster, **flags) for i in range(2)
    ]
    wait_for(tmp_path / "checkpoints" / "2", processes)
    processes[victim].kill()
    began = time.monotonic()
    errors = end(processes)
    assert time.monotonic() - began < partners.TIMEOUT + 10
    assert processes[1 - victim].returncode == 1, errors
    (line,) = [line for line in errors[1 - victim].splitlines() if "step" not in line][-1:]
    assert line == partners.MESSAGE
    assert "Traceback" not in errors[1 - victim] and "stack trace" not in errors[1 - victim]
