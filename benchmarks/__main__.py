"""Speed and memory against PyTorch, on the same machine, weights and threads, in one run.

    python -m benchmarks                    # all rows: about 20 minutes on two CPU cores
    python -m benchmarks --only=encode,decode --seconds=60
    python -m benchmarks --pytorch_python=/elsewhere/bin/python    # which has PyTorch

Writes runs/bench/<date>.json and a table beside it; a second run on the same day, device and
versions replaces the rows that it measures. See docs/benchmarks.md.
"""

import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks import first_image, reference, report
from benchmarks.measure import PLATFORMS, Setting, compare, in_own_process, threads

ROWS = (
    "unet_forward",
    "ddim_50_cfg",
    "denoising_step",
    "autoencoding_step",
    "encode",
    "decode",
    "first_image",
    "input_pipeline",
)
ONLY = flags.DEFINE_list("only", list(ROWS), "Rows to measure.")
OUT = flags.DEFINE_string("out", "runs/bench", "Folder of the results.")
DEVICE = flags.DEFINE_enum("device", "cpu", list(PLATFORMS), "Where both sides run.")
SECONDS = flags.DEFINE_float("seconds", 40.0, "Spent on repeating a row, at least three times.")
QUICK = flags.DEFINE_bool("quick", False, "Tiny networks, once each: does the harness work?")
PYTORCH = flags.DEFINE_bool("pytorch", True, "Time PyTorch, too, where it is installed.")
PYTORCH_PYTHON = flags.DEFINE_string(
    "pytorch_python",
    sys.executable,
    "The interpreter of PyTorch's side, which needs the packages of this one, too.",
)
OF_PYTORCH = ("torch", "diffusers", "lpips")
_VERSIONS = """
import importlib.metadata, json, sys
installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(json.dumps({name: installed.get(name) for name in sys.argv[1:]}))
"""


@functools.cache
def pytorch_versions() -> dict[str, str | None]:
    """The versions of the packages that PyTorch's side needs; None where one isn't installed."""
    command = [PYTORCH_PYTHON.value, "-c", _VERSIONS, *OF_PYTORCH]
    try:
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise app.UsageError(
            f"--pytorch_python={PYTORCH_PYTHON.value} is no Python interpreter"
        ) from error


@functools.cache
def sides() -> tuple[str, ...]:
    """Our side, and PyTorch's if it is installed and wanted."""
    if not PYTORCH.value or DEVICE.value == "tpu":
        return ("ours",)
    if missing := [name for name, version in pytorch_versions().items() if version is None]:
        print(f"PyTorch's side is left out: {', '.join(missing)} not installed", flush=True)
        return ("ours",)
    return ("ours", "pytorch")


def processor() -> str:
    """The name of the processor, if the system has one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(matmul: dict[str, Any]) -> dict[str, Any]:
    """The conditions on which the numbers depend. matmul: the row of that name."""
    seconds = {side: matmul[f"{side}_seconds"] for side in ("ours", "pytorch")}
    seconds = {side: value for side, value in seconds.items() if value is not None}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    versions |= pytorch_versions() if "pytorch" in seconds else {}
    return {
        "device": DEVICE.value,
        "processor": processor(),
        "threads": threads(),
        "python": platform.python_version(),
        "versions": versions,
        "quick": QUICK.value,
        "matmul_gflops": {side: matmul["gflop"] / value for side, value in seconds.items()},
    }


def pipeline_row(row: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the input pipeline, with the rate that the faster training step needs."""
    needs = [
        reference.denoising(QUICK.value).batch_size / step["ours_seconds"]
        for step in steps
        if step["name"].endswith("_step")
    ]
    images = {"images_per_second": reference.PICTURES / row["ours_seconds"]}
    return row | images | {"needed_images_per_second": max(needs, default=None)}


def measure(name: str, setting: Setting, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row. rows: those before it."""
    if name == "first_image":
        return first_image.compare(sides(), setting)
    if name == "input_pipeline":
        budget = min(SECONDS.value, 10)
        return pipeline_row(compare(name, ("ours",), setting, budget), rows)
    return compare(name, sides(), setting, SECONDS.value)


def main(argv: list[str]) -> None:
    """Measure, print each row, and write the results."""
    for name in ONLY.value:
        if name not in ROWS:
            raise app.UsageError(f"unknown row {name!r}; known: {', '.join(ROWS)}")
    sides()  # whose errors come before all work
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), DEVICE.value, QUICK.value, PYTORCH_PYTHON.value)
        in_own_process(reference.write, setting.folder, setting.quick)
        conditions = machine(compare("matmul", sides(), setting, budget=3))
        rate = max(conditions["matmul_gflops"].values())
        rows: list[dict[str, Any]] = []
        for name in (row for row in ROWS if row in ONLY.value):
            rows.append(report.with_fractions(measure(name, setting, rows), rate))
            print(json.dumps(rows[-1]), flush=True)
            path = report.save(Path(OUT.value), conditions, rows, ROWS)
    print(path.with_suffix(".md").read_text())
    print(path)


if __name__ == "__main__":
    app.run(main)
