"""`python -m benchmarks` leaves what it promises; all rows: `make bench BENCH=--quick`."""

import json
import os
import subprocess
import sys

import jax
from conftest import FAST_COMPILATION, ROOT

from benchmarks import first_image, ours, prepared_sampling, reference, report
from benchmarks.measure import Setting, ratios
from latent_diffusion.nets.unet import UNet
from latent_diffusion.tasks import TASKS


def test_quick_writes_rows_and_a_table(tmp_path):
    flags = ["--quick", "--nopytorch", "--only=input_pipeline,encode", f"--out={tmp_path}"]
    env = {**os.environ, "XLA_FLAGS": FAST_COMPILATION}
    command = [sys.executable, "-m", "benchmarks", *flags]
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=400)
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["machine"]["quick"] and report["machine"]["matmul_gflops"]["ours"] > 0
    encode, pipeline = report["rows"]
    assert encode["name"] == "encode" and encode["ours_seconds"] > 0
    assert encode["pytorch_seconds"] is None and encode["ratio_to_pytorch"] is None
    assert encode["gflop"] > 0 and encode["ours_peak_mb"] > 50
    assert pipeline["name"] == "input_pipeline" and pipeline["images_per_second"] > 0
    assert "`encode`" in path.with_suffix(".md").read_text()


def test_a_second_run_of_a_day_replaces_the_rows_that_it_measures(tmp_path):
    machine = {"device": "cpu", "processor": "x", "threads": 2, "python": "3", "versions": {}}
    machine["matmul_gflops"] = {"ours": 10.0}

    def row(name, ours, theirs=None):
        seconds = {"ours": ours} | ({} if theirs is None else {"pytorch": theirs})
        return report.with_fractions({"name": name, **ratios(seconds), "gflop": 5.0}, 20.0)

    def saved(machine, *rows):
        path = report.save(tmp_path, machine, list(rows), ("encode", "decode"))
        return json.loads(path.read_text())["rows"]

    saved(machine, row("decode", 2.0, 4.0), row("encode", 1.0))
    faster = {**machine, "matmul_gflops": {"ours": 11.0}}  # as every run measures again
    encode, decode = saved(faster, row("encode", 0.5))
    assert encode["ours_seconds"] == 0.5 and encode["ratio_to_pytorch"] is None
    assert decode["ratio_to_pytorch"] == 0.5 and decode["pytorch_matmul_fraction"] == 5 / 4 / 20
    assert [r["name"] for r in saved({**machine, "threads": 4}, row("encode", 1.0))] == ["encode"]


def test_every_promised_row_has_its_call():
    steps = {"denoising_step", "autoencoding_step"}
    rows = {"unet_forward", "ddim_50_cfg", "encode", "decode", "input_pipeline", *steps}
    assert rows | {"matmul"} == set(ours.CALLS)
    assert callable(first_image.compare) and callable(ours.first_image)


def test_guided_sampling_is_timed_as_a_call_of_its_shape(tmp_path, monkeypatch):
    """Traced alone; `make bench BENCH=--quick` runs it."""
    task = TASKS["denoising"](reference.denoising(True))
    arrays = reference.inputs(True)
    batch = {"image": arrays["z_t"], "neighbours": arrays["context"]}
    state, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
    network = task.denoiser.replace(params=state.params)
    monkeypatch.setattr(ours, "denoiser", lambda folder, quick: network)
    monkeypatch.setattr(ours, "_flops_of_unet", lambda *given: 1.0)
    monkeypatch.setattr(ours, "_call", lambda call, *given, flops: jax.eval_shape(call, *given))
    assert ours.ddim_50_cfg(tmp_path, True).shape == arrays["z_t"].shape


def test_both_ways_of_sampling_are_timed(monkeypatch, capsys):
    def traced(calls):
        shapes = {jax.eval_shape(call).shape for call in calls.values()}
        assert shapes == {(1, *prepared_sampling.SHAPE)}
        return dict.fromkeys(calls, 1.0)

    small = UNet(4, 32, (1,), 1, (1,), num_heads=4)
    monkeypatch.setattr(prepared_sampling, "UNet", lambda *given, **fields: small)
    monkeypatch.setattr(prepared_sampling, "median_seconds", traced)
    prepared_sampling.main()
    assert capsys.readouterr().out.count("ratio 1.00") == 2


def test_pytorchs_side_runs_in_the_interpreter_that_has_it(tmp_path):
    setting = Setting(tmp_path, "cpu", True, "/elsewhere/python")
    python, *words = setting.command("benchmarks.first_image", "pytorch")
    assert python == "/elsewhere/python" and words[:3] == [
        "-m",
        "benchmarks.first_image",
        "pytorch",
    ]
    assert Setting.read(*words[3:]) == setting
    assert setting.command("benchmarks.first_image", "ours")[0] == sys.executable


def test_an_interpreter_that_is_none_is_named(tmp_path):
    flags = ["--quick", "--only=encode", f"--out={tmp_path}", "--pytorch_python=/nowhere/python"]
    command = [sys.executable, "-m", "benchmarks", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1
    assert "--pytorch_python=/nowhere/python is no Python interpreter" in done.stderr + done.stdout
