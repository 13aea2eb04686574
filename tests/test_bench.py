"""`python -m benchmarks` leaves what it promises; all rows: `make bench BENCH=--quick`."""

import json
import os
import subprocess
import sys

from conftest import FAST_COMPILATION, ROOT

from benchmarks import first_image, ours
from benchmarks.measure import Setting


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


def test_every_promised_row_has_its_call():
    steps = {"denoising_step", "autoencoding_step"}
    rows = {"unet_forward", "ddim_50_cfg", "encode", "decode", "input_pipeline", *steps}
    assert rows | {"matmul"} == set(ours.CALLS)
    assert callable(first_image.compare) and callable(ours.first_image)


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
