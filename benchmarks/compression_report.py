"""Table and plots of benchmarks/compression.py from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.compression_timing import seconds_per_image
from latent_diffusion.runtime.metrics import image_grid

FD, PRECISION, RECALL = "fd_alexnet", "precision_alexnet", "recall_alexnet"

Records = Mapping[str, Mapping[str, Any]]


def scores(records: Records) -> dict[int, dict[int, Any]]:
    """Scores by f, ascending, and number of DDIM steps."""
    rows = {
        int(kind.removeprefix("scores_f")): {int(n): s for n, s in by_steps.items()}
        for kind, by_steps in records.items()
        if kind.startswith("scores_f") and by_steps
    }
    return dict(sorted(rows.items()))


def common_steps(rows: Mapping[int, Mapping[int, Any]]) -> int:
    """The largest number of DDIM steps that every model has been scored with."""
    return max(set.intersection(*(set(row) for row in rows.values())))


def table(records: Records, num_steps: Sequence[int]) -> str:
    """Two Markdown tables: the models, and their samples by numbers of DDIM steps."""
    rows = scores(records)
    n = common_steps(rows)
    lines = [
        f"| f | latent | training steps | s/step | PSNR | rFD | FD, {n} steps | precision | recall "
        "| images/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_model(records, f, n) for f in rows),
    ]
    for count, real in records.get("real", {}).items():
        cells = [_with_error(real[FD]), "", _with_error(real[RECALL])]  # they are precise by nature
        lines.append(f"| {count} real pictures | | | | | | {' | '.join(cells)} | |")
    lines += [
        "",
        f"| f | {' | '.join(f'{n} steps' for n in num_steps)} |",
        f"|---|{'---|' * len(num_steps)}",
    ]
    for f, row in rows.items():
        fds = [f"{row[n][FD][0]:.2f}" if n in row else "–" for n in num_steps]
        seconds = [f"{seconds_per_image(records['timed'][str(f)], n):.3g}" for n in num_steps]
        cells = [f"{fd} ({s} s)" for fd, s in zip(fds, seconds, strict=True)]
        lines.append(f"| {f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _model(records: Records, f: int, num_steps: int) -> str:
    timed, stage = records["timed"][str(f)], records.get("first_stages", {}).get(str(f))
    score = records[f"scores_f{f}"][str(num_steps)]
    cells = [
        f"{f}" if stage else f"{f} (pixels)",
        "×".join(map(str, timed["latent"])),
        f"{records['denoisers'][str(f)]['num_steps']:,}",
        f"{timed['seconds_per_step']:.3g}",
        f"{stage['psnr']:.1f}" if stage else "–",
        f"{stage['rfd_alexnet']:.2f}" if stage else "–",
        *(_with_error(score[name]) for name in (FD, PRECISION, RECALL)),
        f"{1 / seconds_per_image(timed, num_steps):.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _with_error(measured: Sequence[float]) -> str:
    value, error = measured
    digits = 2 if abs(error) < 1 else 1
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def draw(records: Records, path: Path) -> None:
    """Left: f against FD. Right: seconds an image against FD, a line of DDIM steps for each f."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = scores(records)
    n = common_steps(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    values, errors = zip(*(row[n][FD] for row in rows.values()), strict=True)
    left.errorbar(list(rows), values, errors, marker="o", capsize=3, label=f"samples, {n} steps")
    stages = {f: records.get("first_stages", {}).get(str(f)) for f in rows}
    rebuilt = {f: stage["rfd_alexnet"] for f, stage in stages.items() if stage}
    left.plot(list(rebuilt), list(rebuilt.values()), "s--", label="reconstructions")
    left.set_xscale("log", base=2)
    left.set_xticks(list(rows), [str(f) for f in rows])
    left.set(xlabel="f (1: pixels)", ylabel="Fréchet distance (AlexNet)")
    for f, row in rows.items():
        points = [
            (seconds_per_image(records["timed"][str(f)], n), score[FD][0])
            for n, score in row.items()
        ]
        right.plot(*zip(*points, strict=True), marker="o", label=f"f = {f}")
        for n, point in zip(row, points, strict=True):
            right.annotate(str(n), point, (3, 3), textcoords="offset points", fontsize=7)
    for real in records.get("real", {}).values():
        for axes in (left, right):
            axes.axhline(real[FD][0], color="grey", linestyle=":", label="real pictures")
    right.set(xscale="log", xlabel="seconds an image (numbers: DDIM steps)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sheet(root: Path, rows: Mapping[int, Any], shown: int) -> np.ndarray:
    """The first samples of every f, a row each, at the number of steps that all have."""
    n = common_steps(rows)
    folders = [root / f"f{f}" / f"samples_{n}" / "images" for f in rows]
    paths = [folder / f"{i:05d}.png" for folder in folders for i in range(shown)]
    return image_grid(np.stack([np.asarray(Image.open(path)) for path in paths]), shown)


def write(root: Path, records: Records, num_steps: Sequence[int], shown: int) -> None:
    """table.md, plot.png and samples.png; nothing if there are no scores."""
    if not scores(records):
        return
    (root / "table.md").write_text(table(records, num_steps), encoding="utf-8")
    draw(records, root / "plot.png")
    Image.fromarray(sheet(root, scores(records), shown)).save(root / "samples.png")
