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
from conftest import ROOT

from configs import openmoji_text
from latent_diffusion import loop
from latent_diffusion.checkpoint import Checkpointer

STEPS = 8
OWN = {"images_per_second", "peak_memory_gib"}  # of the machine, not of the run
FIELDS = {  # everything that a run does, on as little as possible
    "autoencoder.regularization": "identity",
    "data.image_size": 8,
    "unet.model_channels": 8,
    "unet.channel_mult": (1,),
    "unet.attention_resolutions": (),
    "unet.num_groups": 4,
    "sampling.num_steps": 1,
    "first_stage.num_batches": 1,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.eps": 1e-2,
    "log.eval_every_steps": 4,
    "log.images_every_steps": 8,
    "log.num_images": 2,
}


def _start(workdir, devices=8, num_steps=STEPS, **flags):
    """A run as a user starts it."""
    flags |= {f"config.{name}": value for name, value in FIELDS.items()}
    flags |= {"config.num_steps": num_steps, "workdir": workdir}
    count = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "train.py", "--config=configs/openmoji_text.py:smoke"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    env = os.environ | {"XLA_FLAGS": f"{count} --xla_backend_optimization_level=0"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def _start_two(workdir, *flags):
    """Two processes with four devices each."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{sock.getsockname()[1]}"
    cluster = {"coordinator": coordinator, "num_processes": 2, "connect_timeout": 200}
    return [
        _start(workdir, 4, 1_000_000, **cluster | {"process_id": i} | own)
        for i, own in enumerate(flags)
    ]


def _wait_for(path, processes):
    """Until something matches a glob pattern in its folder, or a process ends."""
    deadline = time.monotonic() + 300
    while not any(path.parent.glob(path.name)) and all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _end(processes):
    """Their standard errors; whatever happens, none is left behind."""
    try:
        return [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def _train_here(workdir, **fields):
    config = openmoji_text.get_config("smoke")
    config.update_from_flattened_dict({**FIELDS, "num_steps": STEPS, **fields})
    return loop.train(config, workdir)


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on eight devices: its workdir and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.tree.map(np.asarray, _train_here(workdir))


def test_two_processes_train_like_one_and_go_on_as_one(whole, tmp_path):
    processes = _start_two(tmp_path, {}, {})
    _wait_for(tmp_path / "config.json", processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is preempted
    errors = _end(processes)
    assert [process.returncode for process in processes] == [143, 143], errors
    assert "stopped by SIGTERM after step" in errors[0]
    assert "step" not in errors[1]  # one voice
    last = _lines(tmp_path)[-1]["step"]
    assert 1 <= last < STEPS
    assert (tmp_path / "checkpoints" / str(last)).is_dir()

    _train_here(tmp_path, **{"parallel.mode": "mesh"})
    for want, got in zip(_lines(whole[0]), _lines(tmp_path), strict=True):
        assert want.keys() - OWN == got.keys() - OWN
        for name in want.keys() - OWN:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_processes_with_other_configs_or_alone_refuse_to_start(tmp_path):
    processes = _start_two(tmp_path, {}, {"config.batch_size": 16})
    processes += _start_two(tmp_path, {"connect_timeout": 2})
    errors = _end(processes)
    assert [process.returncode for process in processes] == [1, 1, 1], errors
    assert "error: the processes of this run don't have the same config" in errors[0]
    expected = "process 1 has another config than process 0: batch_size=16 instead of 8"
    assert f"error: {expected}" in errors[1]
    assert "error: not all processes joined at 127.0.0.1:" in errors[2]
    assert not (tmp_path / "checkpoints").exists()


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(whole, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for moment in ("*tmp*", "4"):  # during the first save; among later steps
        process = _start(tmp_path)
        _wait_for(checkpoints / moment, [process])
        process.kill()
        errors = _end([process])
        assert process.returncode == -signal.SIGKILL, errors
    (error,) = _end([_start(tmp_path)])
    assert "resuming from step" in error
    with Checkpointer(checkpoints, read_only=True) as restored:
        state = restored.restore(whole[1]).state
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, STEPS + 1))
