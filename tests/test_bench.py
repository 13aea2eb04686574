"""`python -m benchmarks` leaves the rows that it promises."""

import json
import os
import subprocess
import sys

from conftest import ROOT

ROWS = [
    *("unet_forward", "ddim_50_cfg", "denoising_step", "autoencoding_step", "encode", "decode"),
    *("first_image", "input_pipeline"),
]


def test_quick_writes_every_row(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--nopytorch", f"--out={tmp_path}"]
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=400)
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["machine"]["quick"] and report["machine"]["matmul_gflops"]["ours"] > 0
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ROWS
    for row in rows.values():
        assert row["ours_seconds"] > 0
        assert row["pytorch_seconds"] is None and row["ratio_to_pytorch"] is None
    for name in ROWS[:6]:
        assert rows[name]["gflop"] > 0 and rows[name]["ours_peak_mb"] > 50
    assert rows["first_image"]["ours_cold_seconds"] > 0
    pipeline = rows["input_pipeline"]
    assert pipeline["images_per_second"] > 0 and pipeline["needed_images_per_second"] > 0
    assert all(f"`{name}`" in path.with_suffix(".md").read_text() for name in ROWS)
