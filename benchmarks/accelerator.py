"""Everything that one machine with a GPU or TPU can tell, within 25 minutes.

    python -m benchmarks.accelerator                           # make accelerator
    python -m benchmarks.accelerator --tiny --only=attention   # does the harness work?

Writes accelerator.json and accelerator.md into runs/accelerator. Every part runs in a process that
may take its share of the time; one that fails or is late is reported, and the others go on.
Weights are random, so nothing is downloaded. PyTorch's side is timed where torch and diffusers are
installed. See docs/benchmarks.md.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

SHARES = {  # part -> its share of the budget
    "parity": 1,
    "attention": 2,
    "train_sd_v1": 3,
    "train_sdxl": 3,
    "train_dit_xl_2": 2,
    "train_kl_f8": 2,
    "sample_sd_v1": 3,
    "sample_sdxl": 3,
    "pytorch_sd_v1": 3,
    "pytorch_sdxl": 2,
    "first_image": 2,
}
ONLY = flags.DEFINE_list("only", list(SHARES), "Parts to measure.")
OUT = flags.DEFINE_string("out", "runs/accelerator", "Folder of the results.")
MINUTES = flags.DEFINE_float("minutes", 25.0, "For all parts together.", lower_bound=0.1)
TINY = flags.DEFINE_bool("tiny", False, "Tiny networks and shapes.")
PART = flags.DEFINE_string("part", None, "Measure this part here, and print it as JSON.")


def run_part(name: str, seconds: float, tiny: bool) -> dict[str, Any]:
    """One part in a process of its own: its rows, or the reason why there are none."""
    if name.startswith("pytorch") and not all(
        map(importlib.util.find_spec, ("torch", "diffusers"))
    ):
        return {"part": name, "failed": "torch and diffusers aren't installed"}
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={name}"]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            part = {"part": name, "failed": reason[:300]}
        else:
            part = {"part": name, **json.loads(done.stdout.strip().splitlines()[-1])}
    except subprocess.TimeoutExpired:
        part = {"part": name, "failed": f"not done in {seconds:.0f} s"}
    return part | {"seconds": round(time.perf_counter() - start, 1)}


def markdown(parts: list[dict[str, Any]]) -> str:
    """A page with a table for each part."""
    lines = ["# One accelerator, measured", ""]
    for part in parts:
        lines += [f"## {part['part']}", ""]
        if "failed" in part:
            lines += [f"**Failed**: {part['failed']}", ""]
            continue
        lines += [f"{part['device']}, {part['seconds']} s in all.", ""]
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in part["rows"]:
            lines.append(f"| {' | '.join(_cell(row.get(key)) for key in columns)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def save(folder: Path, parts: list[dict[str, Any]]) -> None:
    """Write what is measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accelerator.json").write_text(json.dumps(parts, indent=1) + "\n")
    (folder / "accelerator.md").write_text(markdown(parts))


def main(argv: list[str]) -> None:
    """Measure all parts, each in a process; or one of them here."""
    for name in [*ONLY.value, *([PART.value] if PART.value else [])]:
        if name not in SHARES:
            raise app.UsageError(f"unknown part {name!r}; known: {', '.join(SHARES)}")
    if PART.value:
        from benchmarks import accelerator_parts

        print(json.dumps(accelerator_parts.measure(PART.value, TINY.value)))
        return
    second = 60 * MINUTES.value / sum(SHARES[name] for name in ONLY.value)
    parts: list[dict[str, Any]] = []
    for name in ONLY.value:
        parts.append(run_part(name, SHARES[name] * second, TINY.value))
        print(json.dumps(parts[-1]), flush=True)
        save(Path(OUT.value), parts)
    print(Path(OUT.value) / "accelerator.md")


if __name__ == "__main__":
    app.run(main)
