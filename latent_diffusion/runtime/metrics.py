"""What a run leaves for its reader: numbers, pictures, a progress bar, and the reason it stopped.

Only process 0 writes; on the others every method does nothing.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
import tqdm
from jaxtyping import Num, UInt8

from latent_diffusion.runtime import processes
from latent_diffusion.trees import leaves_by_path
from latent_diffusion.types import Array, PyTree

GRID_PADDING = 2  # pixels of white between the images of a grid
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


# ---------------------------------------------------------------------------- files


class Writer:
    """Writes `metrics.jsonl`, TensorBoard events and `images/` of one workdir; a context manager.

    step: the step the run (re)starts from. What an earlier run has logged beyond it is removed
    from metrics.jsonl and hidden in TensorBoard, so steps are unique and increase.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        import tensorboardX  # 0.3 s that sampling shouldn't pay

        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / "metrics.jsonl"
        path.touch()
        self._lines = path.open("r+b")
        self._last_step, self._last_start = _cut_after(self._lines, step)
        self._events = tensorboardX.SummaryWriter(
            str(self.workdir / "tensorboard"), purge_step=step + 1
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log numbers by name. A second call for the same step adds to its line.

        Values that aren't finite are null in the JSON. Raises ValueError for an earlier step.
        """
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        record: dict[str, Any] = {"step": step}
        if step == self._last_step:
            self._lines.seek(self._last_start)
            record = json.loads(self._lines.read())
            self._lines.seek(self._last_start)
        elif step < self._last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self._last_step}")
        record.update({k: v if math.isfinite(v) else None for k, v in numbers.items()})
        self._last_step, self._last_start = step, self._lines.tell()
        self._lines.write(json.dumps(record).encode() + b"\n")
        self._lines.flush()
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def logged(self, step: int) -> dict[str, Any]:
        """The numbers that are logged for `step`, if it is the last one; equal on all processes.

        "pictures" is whether there are any of this step.
        """
        record: dict[str, Any] = {}
        if self._active:
            if step == self._last_step:
                self._lines.seek(self._last_start)
                line = json.loads(self._lines.read())
                record = {name: math.nan if v is None else v for name, v in line.items()}
            record["pictures"] = any((self.workdir / "images").glob(f"*_{step:08d}.png"))
        return json.loads(processes.from_first(json.dumps(record)))

    def image(self, step: int, name: str, image: Num[Array | np.ndarray, "H W 3"]) -> None:
        """Write `images/<name>_<step>.png` and a TensorBoard image. Floats are in [-1, 1]."""
        if not self._active:
            return
        pixels = to_uint8(image)
        path = self.workdir / "images" / f"{name}_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
        self._events.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring what TensorBoard's writer holds back to disk."""
        if self._active:
            self._events.flush()

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        if self._active:
            self._active = False
            self._events.close()
            self._lines.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_after(lines: Any, step: int) -> tuple[int, int]:
    """Truncate a JSONL file behind its last good line up to `step`: (its step, where it starts)."""
    last_step, last_start, end = -1, 0, 0
    for line in lines:
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break  # the run was killed while writing it
        if not last_step < number <= step or not line.endswith(b"\n"):
            break
        last_step, last_start, end = number, end, end + len(line)
    lines.seek(end)
    lines.truncate()
    return last_step, last_start


# ---------------------------------------------------------------------------- pictures


def to_uint8(
    images: Num[Array | np.ndarray, "*B H W C"],
) -> UInt8[np.ndarray, "*B H W C"]:
    """Images in [-1, 1] as bytes, clipped and *rounded*; uint8 images pass through; NaN is black.

    The original system truncates, which darkens by half a level on average, and turns bytes that
    went to [-1, 1] and back into their neighbours.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    levels = np.nan_to_num(images.astype(np.float32) * 127.5 + 127.5, nan=0.0)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def image_grid(
    images: Num[Array | np.ndarray, "N H W 3"], columns: int
) -> UInt8[np.ndarray, "GH GW 3"]:
    """Images side by side, row by row, white between them and where the last row ends early."""
    pixels = to_uint8(images)
    num, height, width, _ = pixels.shape
    columns = max(1, min(columns, num))
    rows = -(-num // columns)
    pad = GRID_PADDING
    grid = np.full(
        (pad + rows * (height + pad), pad + columns * (width + pad), 3), 255, dtype=np.uint8
    )
    for i, image in enumerate(pixels):
        top = pad + (i // columns) * (height + pad)
        left = pad + (i % columns) * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def image_log_steps(step: int, every: int) -> bool:
    """Whether to log pictures at `step`: 1, 2, 4, 8... below `every`, then each multiple of it."""
    if step <= 0 or every <= 0:
        return False
    return step % every == 0 or (step < every and step & (step - 1) == 0)


# ---------------------------------------------------------------------------- NaN


class NonFiniteError(RuntimeError):
    """Training has produced NaN or infinity; the message says at which step and where."""


def find_non_finite(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the metrics (scalars or arrays) that hold NaN or infinity."""
    return [name for name, value in metrics.items() if not np.all(np.isfinite(np.asarray(value)))]


def non_finite_paths(tree: PyTree) -> list[str]:
    """Paths of the floating-point leaves that hold NaN or infinity."""
    return [
        path
        for path, leaf in leaves_by_path(tree).items()
        if jax.dtypes.issubdtype(leaf.dtype, np.inexact)
        and not bool(jax.numpy.isfinite(leaf).all())
    ]


def check_finite(step: int, metrics: Mapping[str, Any], params: PyTree = None) -> None:
    """Raise NonFiniteError if a metric isn't finite, naming it and the first bad parameter."""
    names = find_non_finite(metrics)
    if not names:
        return
    culprits = ", ".join(f"{name} = {np.asarray(metrics[name])}" for name in names)
    paths = [] if params is None else non_finite_paths(params)
    where = f"; {len(paths)} parameters are not finite, first {paths[0]}" if paths else ""
    if params is not None and not paths:
        where = "; all parameters are still finite"
    raise NonFiniteError(f"step {step}: {culprits}{where}")


# ---------------------------------------------------------------------------- speed and progress


class Throughput:
    """Images per second between two readings, compilation and pauses excluded."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._since: float | None = None
        self._images = 0

    def add(self, num_images: int) -> None:
        """Count a step that has just been dispatched. The first one only starts the clock."""
        if self._since is None:
            self._since = self._clock()
        else:
            self._images += num_images

    def read(self) -> float | None:
        """Images per second since the last reading; None before there is anything to count.

        Read after the step's metrics have been fetched: dispatch alone is asynchronous.
        """
        now = self._clock()
        elapsed = now - self._since if self._since is not None else 0.0
        rate = self._images / elapsed if self._images and elapsed > 0 else None
        if self._since is not None:
            self._since, self._images = now, 0
        return rate

    def skip(self) -> None:
        """Leave out what happened since the last reading (evaluation, pictures, a save)."""
        self._since, self._images = None, 0


def peak_memory() -> float:
    """GiB that were in use at most: on the fullest local device, or by this process on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if not peaks:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = [unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    return max(peaks) / 2**30


class Progress:
    """A bar with ETA, loss and images/s in a terminal; a plain line now and then elsewhere.

    total, start: the last step, and the one the run goes on from. A context manager.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "step",
    ) -> None:
        self._total, self._start, self._clock, self._unit = total, start, clock, unit
        self._active = jax.process_index() == 0
        self._bar: tqdm.tqdm | None = None
        self._first: tuple[int, float] | None = None  # step and time after compilation
        self._printed = -math.inf
        if self._active and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True)

    def update(self, step: int) -> None:
        """Call after every step."""
        if self._first is None:
            self._first = (step, self._clock())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show numbers by name (loss, images/s ...) beside the bar, or in a line of their own."""
        shown = {name: f"{value:.4g}" for name, value in values.items() if value is not None}
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        now = self._clock()
        due = now - self._printed >= PLAIN_INTERVAL or step == self._total
        if not self._active or not due:
            return
        self._printed = now
        words = [f"{self._unit} {step}/{self._total}", *(f"{k} {v}" for k, v in shown.items())]
        if self._first is not None and step > self._first[0]:
            left = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
            words.append(f"ETA {tqdm.tqdm.format_interval(left)}")
        print("  ".join(words), file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._active:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to a new line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
