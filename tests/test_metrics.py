"""Steps are unique after a resume, bytes survive the round trip, NaN is named."""

import functools
import io
import json
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tqdm
from tensorboardX.proto import event_pb2

from latent_diffusion.runtime import metrics
from latent_diffusion.runtime.metrics import (
    NonFiniteError,
    Progress,
    Throughput,
    Writer,
    peak_memory,
)

START = event_pb2.SessionLog(status=event_pb2.SessionLog.START)


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def event_file_text(workdir):
    return b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())


def shown(workdir):
    """(name, step, number or size of the picture) of everything that TensorBoard shows."""
    found, data = [], event_file_text(workdir)
    while data:  # length, checksum, event, checksum
        end = 12 + int.from_bytes(data[:8], "little")
        event, data = event_pb2.Event.FromString(data[12:end]), data[end + 4 :]
        for value in event.summary.value:
            size = (value.image.height, value.image.width)
            found.append((value.tag, event.step, value.simple_value if size == (0, 0) else size))
    return found


# ---------------------------------------------------------------------------- files


def test_scalars_and_images_reach_the_workdir(tmp_path):
    image = np.linspace(-1, 1, 4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    with Writer(tmp_path / "run") as writer:
        writer.scalars(1, {"train/loss": jnp.float32(0.5)})
        writer.scalars(3, {"train/loss": np.float32(0.25)})
        writer.image(3, "samples", image)
        writer.flush()
    assert read_lines(tmp_path / "run") == [
        {"step": 1, "train/loss": 0.5},
        {"step": 3, "train/loss": 0.25},
    ]
    png = PIL.Image.open(tmp_path / "run/images/samples_00000003.png")
    np.testing.assert_array_equal(np.asarray(png), metrics.to_uint8(image))
    assert shown(tmp_path / "run") == [
        ("train/loss", 1, 0.5),
        ("train/loss", 3, 0.25),
        ("samples", 3, (4, 5)),
    ]


def test_two_calls_for_one_step_share_a_line(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {"loss": 1})
        writer.scalars(2, {"loss": 2, "eval/psnr": 19.123456})
        writer.scalars(2, {"eval/psnr": 20})
        assert read_lines(tmp_path)[-1] == {"step": 2, "loss": 2, "eval/psnr": 20}
        writer.scalars(3, {"loss": 3})
        with pytest.raises(ValueError, match="step 2 come after those of step 3"):
            writer.scalars(2, {"loss": 0})
    assert read_lines(tmp_path) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2, "eval/psnr": 20},
        {"step": 3, "loss": 3},
    ]


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo', b"[]\n", b'{"step": 4, "loss": 4}'])
def test_resume_drops_what_lies_beyond_the_restored_step(tmp_path, torn):
    with Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with Writer(tmp_path, step=2) as writer:
        writer.scalars(2, {"again": 1})
        writer.scalars(3, {"loss": 30})
    assert read_lines(tmp_path) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2, "again": 1},
        {"step": 3, "loss": 30},
    ]
    # TensorBoard hides what lies at this step and beyond it.
    hides = event_pb2.Event(step=3, session_log=START).SerializeToString()
    assert len(hides) > 4 and hides in event_file_text(tmp_path)
    with Writer(tmp_path, step=9) as writer:
        writer.scalars(10, {"loss": 10})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 10]
    Writer(tmp_path, step=0).close()
    assert read_lines(tmp_path) == []


def test_resume_drops_pictures_beyond_the_restored_step(tmp_path):
    with Writer(tmp_path) as writer:
        for step in (2, 4, 8):
            writer.image(step, "samples", np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "images" / "mine_x.png").touch()
    with Writer(tmp_path, step=4) as writer:
        assert [writer.logged(step)["pictures"] for step in (2, 4, 8)] == [True, True, False]
    names = [f"samples_0000000{step}.png" for step in (2, 4)]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["mine_x.png", *names]


def test_a_last_line_without_its_end_is_dropped_and_not_continued(tmp_path):
    lines = b'{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    with Writer(tmp_path, step=2) as writer:
        writer.scalars(3, {"loss": 3})
    assert read_lines(tmp_path) == [{"step": 1, "loss": 1}, {"step": 3, "loss": 3}]


def test_a_number_that_is_logged_anew_leaves_nothing_of_the_old_one(tmp_path):
    with Writer(tmp_path) as writer:
        for value in (0.12345678901234567, 0.5):
            writer.scalars(1, {"loss": value})
    assert read_lines(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_non_finite_numbers_are_null_in_json(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {"loss": float("nan"), "norm": float("inf")})
        assert math.isnan(writer.logged(1)["loss"])  # a number again, for whoever compares it
    assert read_lines(tmp_path) == [{"step": 1, "loss": None, "norm": None}]


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Writer(tmp_path) as writer, Progress(10) as progress:
        writer.scalars(1, {"loss": 1.0})
        writer.image(1, "a", np.zeros((2, 2, 3), np.float32))
        writer.flush()
        progress.update(1)
        progress.report(10, {"loss": 1.0})
        progress.write("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------- pictures


def test_to_uint8_inverts_the_usual_scaling_clips_and_rounds():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    for scaled in (levels / 127.5 - 1, (levels.astype(np.float32) / 127.5 - 1)):
        np.testing.assert_array_equal(metrics.to_uint8(scaled), levels)
    edge = np.asarray([-3, 3, np.nan, np.inf, -np.inf, 0.003], np.float32).reshape(1, 2, 3)
    assert metrics.to_uint8(edge).ravel().tolist() == [0, 255, 0, 255, 0, 128]
    assert metrics.to_uint8(levels) is levels


def test_image_grid_places_images_row_by_row():
    images = np.stack([np.full((3, 4, 3), i, np.uint8) for i in range(5)])
    grid = metrics.image_grid(images, columns=3)
    assert grid.shape == (2 + 2 * 5, 2 + 3 * 6, 3)
    for i in range(5):
        top, left = 2 + (i // 3) * 5, 2 + (i % 3) * 6
        assert np.unique(grid[top : top + 3, left : left + 4]).tolist() == [i]
    assert np.unique(grid[7:, 14:]).tolist() == [255]
    assert metrics.image_grid(jnp.asarray(images[:2]), columns=8).shape == (7, 14, 3)


def test_image_log_steps_doubles_then_repeats():
    logged = [step for step in range(1001) if metrics.image_log_steps(step, 250)]
    assert logged == [1, 2, 4, 8, 16, 32, 64, 128, 250, 500, 750, 1000]
    assert not any(metrics.image_log_steps(step, 0) for step in range(10))


# ---------------------------------------------------------------------------- NaN


def test_non_finite_is_named():
    values = {"loss": jnp.nan, "kl": 1.0, "norm": np.asarray([1, np.inf]), "steps": np.int32(3)}
    with pytest.raises(NonFiniteError, match=r"^step 7: loss = nan, norm = \[ 1. inf\]$"):
        metrics.check_finite(7, values)
    params = {
        "good": jnp.ones(2),
        "bad": {"kernel": jnp.asarray([0, jnp.inf], jnp.bfloat16)},
        "count": jnp.int32(0),
        "rng": jax.random.key(0),
    }
    assert metrics.non_finite_paths(params) == ["bad/kernel"]
    metrics.check_finite(7, {"loss": 1.0}, params)
    with pytest.raises(NonFiniteError, match=r"^step 7: loss = nan; 1 parameters .*bad/kernel$"):
        metrics.check_finite(7, {"loss": jnp.nan, "kl": 1.0}, params)
    with pytest.raises(NonFiniteError, match="loss = nan; all parameters are still finite"):
        metrics.check_finite(7, {"loss": jnp.nan}, {"good": jnp.ones(2)})
    with pytest.raises(NonFiniteError, match=r"loss = inf$"):
        metrics.check_finite(7, {"loss": jnp.inf})
    _, flagged = metrics.flagged(lambda: (None, {"loss": jnp.inf, "kl": 1.0}))()
    with pytest.raises(NonFiniteError, match="loss = inf"):
        metrics.check_finite(7, flagged)


# ---------------------------------------------------------------------------- speed and progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_throughput_excludes_compilation_and_pauses():
    clock = Clock()
    meter = Throughput(clock)
    assert meter.read() is None
    clock.now = 60.0  # compilation
    meter.add(8)
    assert meter.read() is None
    for _ in range(5):
        clock.now += 2
        meter.add(8)
    assert meter.read() == pytest.approx(4.0)
    meter.add(8)  # just before an evaluation
    clock.now += 101  # with a step of a second
    meter.skip(100)
    meter.add(8)
    clock.now += 1
    meter.add(8)
    assert meter.read() == pytest.approx(24 / 2)


def test_progress_without_a_terminal_prints_a_line_now_and_then(capsys):
    clock = Clock()
    with Progress(100, start=20, clock=clock) as progress:
        for step in range(21, 101):
            clock.now += 60 if step == 21 else 1
            progress.update(step)
            progress.report(step, {"loss": 0.123456, "images/s": None if step == 21 else 32.0})
        progress.write("saved")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 21/100  loss 0.1235"
    assert lines[1] == "step 31/100  loss 0.1235  images/s 32  ETA 01:09"
    assert lines[-2:] == ["step 100/100  loss 0.1235  images/s 32  ETA 00:00", "saved"]
    assert len(lines) == 10


def test_progress_in_a_terminal_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    # conftest.py disables bars, which tqdm reads when it is imported.
    monkeypatch.setattr(tqdm, "tqdm", functools.partial(tqdm.tqdm, disable=False))
    with Progress(10, start=4) as progress:
        progress.update(5)
        progress.report(5, {"loss": 0.5})
        progress.write("saved step 5")
        progress.update(10)
    text = terminal.getvalue()
    assert "loss=0.5" in text and "saved step 5\n" in text and "10/10" in text


def test_peak_memory_is_the_most_that_was_in_use():
    before = peak_memory()
    assert 0.01 < before < 1000
    taken = np.ones(2**30 // 8)  # 1 GiB
    del taken
    assert 1 <= peak_memory() < before + 1.5


def test_the_peak_of_accelerators_is_that_of_the_fullest(monkeypatch):
    stats = ({"peak_bytes_in_use": 3 * 2**30}, {"peak_bytes_in_use": 5 * 2**30}, None)
    devices = [SimpleNamespace(memory_stats=lambda own=own: own) for own in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == 5


def test_a_thread_of_tensorboard_that_has_failed_is_an_error(tmp_path):
    """Its queue is full after some calls, and the next would wait for ever."""
    writer = Writer(tmp_path)
    writer.scalars(1, {"loss": 1})
    worker = writer._events.file_writer.event_writer._worker
    worker.stop()
    with pytest.raises(OSError, match="tensorboard: its writer has failed; is the disk full"):
        writer.scalars(2, {"loss": 2})
    with pytest.raises(OSError, match="its writer has failed"):
        writer.image(2, "samples", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]
