"""The output of a run: numbers, pictures, a progress bar, and the error for NaN.

Only process 0 writes; on other processes the methods do nothing.
"""

import functools
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
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tqdm
from jaxtyping import Num, UInt8

from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.core.types import Array, PyTree
from latent_diffusion.runtime import processes

GRID_PADDING = 2  # white pixels between the images of a grid
PLAIN_INTERVAL = 10.0  # seconds between progress lines without a terminal


# ---------------------------------------------------------------------------- files


class Writer:
    """Writes `metrics.jsonl`, TensorBoard events and `images/` of one workdir; a context manager.

    step: the step from which the run starts or resumes. Later lines of an earlier run are removed
    from metrics.jsonl and hidden in TensorBoard, so that steps are unique and increase; its later
    pictures are removed, too.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        import tensorboardX  # takes 0.3 s, which sampling doesn't need

        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / "metrics.jsonl"
        path.touch()
        self._lines = path.open("r+b")
        self._record, self._start = _cut_after(self._lines, step)
        for path in (self.workdir / "images").glob("*_[0-9]*.png"):
            number = path.stem.rpartition("_")[2]
            if number.isdecimal() and int(number) > step:
                path.unlink()
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
        last = self._record["step"]
        if step < last:
            raise ValueError(f"metrics of step {step} come after those of step {last}")
        if step == last:
            self._lines.truncate(self._lines.seek(self._start))
        else:
            self._record, self._start = {"step": step}, self._lines.tell()
        self._record |= {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._lines.write(json.dumps(self._record).encode() + b"\n")
        self._lines.flush()
        self._check_events()
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def logged(self, step: int) -> dict[str, Any]:
        """The numbers of `step`, if they were logged last; equal on all processes.

        "pictures": whether there are pictures of this step.
        """
        record: dict[str, Any] = {}
        if self._active:
            if step == self._record["step"]:
                record = {k: math.nan if v is None else v for k, v in self._record.items()}
            record["pictures"] = any((self.workdir / "images").glob(f"*_{step:08d}.png"))
        return json.loads(processes.from_first(json.dumps(record)))

    def image(self, step: int, name: str, image: Num[Array | np.ndarray, "H W 3"]) -> None:
        """Write `images/<name>_<step>.png` and a TensorBoard image. Floats are in [-1, 1]."""
        if not self._active:
            return
        pixels = to_uint8(image)
        path = self.workdir / "images" / f"{name}_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        PIL.Image.fromarray(pixels).save(partial, "PNG")
        partial.replace(path)
        self._check_events()
        self._events.add_image(name, pixels, step, dataformats="HWC")

    def _check_events(self) -> None:
        """Raise OSError if TensorBoard's thread has ended, for whose queue a call would wait."""
        if not self._events.file_writer.event_writer._worker.is_alive():
            where = self.workdir / "tensorboard"
            raise OSError(f"can't write {where}: its writer has failed; is the disk full?")

    def flush(self) -> None:
        """Write the events that TensorBoard's writer has buffered to disk."""
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


def _cut_after(lines: Any, step: int) -> tuple[dict[str, Any], int]:
    """Truncate a JSONL file after the last good line up to `step`.

    Returns the record of this line, and the line's position.
    """
    last: dict[str, Any] = {"step": -1}
    start = end = 0
    for line in lines:
        try:
            record = json.loads(line)
            follows = last["step"] < record["step"] <= step
        except (ValueError, KeyError, TypeError):
            break  # the run was killed while it wrote the line
        if not follows or not line.endswith(b"\n"):
            break
        last, start, end = record, end, end + len(line)
    lines.seek(end)
    lines.truncate()
    return last, start


# ---------------------------------------------------------------------------- pictures


def to_uint8(
    images: Num[Array | np.ndarray, "*B H W C"],
) -> UInt8[np.ndarray, "*B H W C"]:
    """Images in [-1, 1] as bytes, clipped and *rounded*; uint8 images stay as they are; NaN is 0.

    The original code truncates, which darkens pictures by half a level on average.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    levels = np.nan_to_num(images.astype(np.float32) * 127.5 + 127.5, nan=0.0)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def as_picture(image: UInt8[np.ndarray, "H W C"]) -> PIL.Image.Image:
    """The image as Pillow's picture, which is grey if the image has one channel."""
    return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def image_grid(
    images: Num[Array | np.ndarray, "N H W 3"], columns: int
) -> UInt8[np.ndarray, "GH GW 3"]:
    """A grid of images, row by row, with white between them and at the end of the last row."""
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
    """Training has produced NaN or infinity; the message names the step, metrics and parameter."""


def non_finite_paths(tree: PyTree) -> list[str]:
    """Paths of floating-point leaves with NaN or infinity."""
    return [
        path
        for path, leaf in leaves_by_path(tree).items()
        if jax.dtypes.issubdtype(leaf.dtype, np.inexact)
        and not bool(jax.numpy.isfinite(leaf).all())
    ]


def flagged(step: Callable[..., Any]) -> Callable[..., Any]:
    """The training step with a further metric `finite`: whether all other metrics are finite."""

    @functools.wraps(step)
    def function(*args: Any, **options: Any) -> Any:
        state, values = step(*args, **options)
        each = [jnp.all(jnp.isfinite(value)) for value in values.values()]
        return state, {**values, "finite": jnp.all(jnp.stack(each))}

    return function


def check_finite(step: int, metrics: Mapping[str, Any], params: PyTree = None) -> None:
    """Raise NonFiniteError, which names metrics that aren't finite and the first such parameter.

    If the metric `finite` (see `flagged`) is true, no other metric is read.
    """
    if "finite" in metrics and bool(metrics["finite"]):
        return
    values = {name: np.asarray(value) for name, value in metrics.items()}
    bad = {name: value for name, value in values.items() if not np.all(np.isfinite(value))}
    if not bad:
        return
    culprits = ", ".join(f"{name} = {value}" for name, value in bad.items())
    paths = [] if params is None else non_finite_paths(params)
    where = f"; {len(paths)} parameters are not finite, first {paths[0]}" if paths else ""
    if params is not None and not paths:
        where = "; all parameters are still finite"
    raise NonFiniteError(f"step {step}: {culprits}{where}")


# ---------------------------------------------------------------------------- speed and progress


class Throughput:
    """Images per second between two readings, without compilation and pauses."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._since: float | None = None
        self._images = 0

    def add(self, num_images: int) -> None:
        """Count a step whose metrics have arrived. The first step only starts the clock."""
        if self._since is None:
            self._since = self._clock()
        else:
            self._images += num_images

    def read(self) -> float | None:
        """Images per second since the last reading; None before the second step."""
        now = self._clock()
        elapsed = now - self._since if self._since is not None else 0.0
        rate = self._images / elapsed if self._images and elapsed > 0 else None
        if self._since is not None:
            self._since, self._images = now, 0
        return rate

    def skip(self, seconds: float) -> None:
        """Leave out the time of an evaluation, of pictures or a save."""
        if self._since is not None:
            self._since += seconds


def peak_memory() -> float:
    """The peak memory in GiB: that of the fullest local device, or of this process on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if not peaks:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = [unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    return max(peaks) / 2**30


class Progress:
    """A bar with ETA, loss and images/s in a terminal; a plain line every 10 seconds elsewhere.

    total: the last step. start: the step from which the run resumes. A context manager.
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
        """Show numbers by name (loss, images/s ...) beside the bar, or in a line."""
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
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._active:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and begin a new line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
