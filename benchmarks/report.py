"""The results as JSON and as a Markdown table."""

import datetime
import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def with_fractions(row: dict[str, Any], rate: float) -> dict[str, Any]:
    """The row with each side's share of the measured rate of matrix products, in GFLOP/s."""
    gflop = row.get("gflop")
    if not gflop:
        return row
    shares = {
        f"{side}_matmul_fraction": gflop / seconds / rate
        for side in ("ours", "pytorch")
        if (seconds := row[f"{side}_seconds"])
    }
    return row | shares


def save(folder: Path, machine: dict[str, Any], rows: list[dict[str, Any]], order: Any) -> Path:
    """Write <date>.json and <date>.md; other rows of the day's file stay in it."""
    path = folder / f"{datetime.date.today().isoformat()}.json"
    by_name: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text())
        if _lasting(before["machine"]) == _lasting(machine):
            by_name = {row["name"]: row for row in before["rows"]}
    by_name |= {row["name"]: row for row in rows}
    report = {"machine": machine, "rows": [by_name[name] for name in order if name in by_name]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    return path


def _lasting(machine: dict[str, Any]) -> dict[str, Any]:
    """The machine without the numbers that every run measures again."""
    return {key: value for key, value in machine.items() if key != "matmul_gflops"}


def markdown(report: Report) -> str:
    """A table of the rows, below a line on the machine."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rates = ", ".join(f"{side} {rate:.0f}" for side, rate in machine["matmul_gflops"].items())
    lines = [
        f"{machine['device']}: {machine['processor']}, {machine['threads']} threads, float32; "
        f"Python {machine['python']}, {versions}. Matrix products: {rates} GFLOP/s.",
        "",
        "| | ours, s | PyTorch, s | ours ÷ PyTorch | peak MB, ours | peak MB, PyTorch | GFLOP "
        "| share of matmul rate, ours | PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = (
        ("ours_seconds", ".3f"),
        ("pytorch_seconds", ".3f"),
        ("ratio_to_pytorch", ".2f"),
        ("ours_peak_mb", ",.0f"),
        ("pytorch_peak_mb", ",.0f"),
        ("gflop", ",.1f"),
        ("ours_matmul_fraction", ".0%"),
        ("pytorch_matmul_fraction", ".0%"),
    )
    for row in report["rows"]:
        cells = [format(row[key], form) if row.get(key) else "–" for key, form in columns]
        lines.append(" | ".join([f"| `{row['name']}`", *cells]) + " |")
    lines += ["", *_notes({row["name"]: row for row in report["rows"]})]
    return "\n".join(lines) + "\n"


def _notes(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    if first := rows.get("first_image"):
        lines.append(
            f"First image with nothing compiled before: {first['ours_cold_seconds']:.1f} s."
        )
    if pipeline := rows.get("input_pipeline"):
        line = f"Input pipeline: {pipeline['images_per_second']:.0f} images/s"
        if need := pipeline["needed_images_per_second"]:
            line += f", {pipeline['images_per_second'] / need:.0f} times what the steps take"
        lines.append(line + ".")
    return lines
