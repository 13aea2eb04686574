"""Pictures per second by threads and by worker processes (`data.workers`), in turns.

    python -m benchmarks.workers [--workers=2] [--seconds=15]

JPEG files of 512×512 pixels, cut and resized to 256×256: as they are, and with the degradations of
BSRGAN, whose transform is Python. Several turns of each, so that a busy machine slows both.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from configs import default
from latent_diffusion import data

WORKERS = flags.DEFINE_integer("workers", 2, "Processes, against threads alone.")
SECONDS = flags.DEFINE_float("seconds", 15, "Of each turn, after its first batches.")
LOW_RES = flags.DEFINE_list("low_res", ["", "bsrgan_light"], "Degradations to measure.")
PICTURES, TURNS, BATCH = 64, 3, 4


def batches_of(folder: str, low_res: str, workers: int) -> Any:
    """Training batches."""
    fields = default.data()
    fields.update({"name": "image_folder", "dir": folder, "image_size": 256, "flip": True})
    fields.update({"train_split": "all", "crop": "random", "low_res": low_res})
    source = data.make_source(fields, "train")
    transform = data.make_transform(fields, train=True, as_bytes=True)
    return data.iterate(source, transform, batch_size=BATCH, seed=0, workers=workers)


def rate(batches: Any) -> float:
    """Pictures per second, without the start and the batches that waited."""
    for _ in itertools.islice(batches, 20):
        pass
    begin = time.perf_counter()
    for count in itertools.count(1):
        next(batches)
        if (elapsed := time.perf_counter() - begin) > SECONDS.value:
            return BATCH * count / elapsed
    raise AssertionError


def main(argv: list[str]) -> None:
    """Write pictures, measure, print."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(PICTURES):
            small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            small.resize((512, 512), Image.Resampling.BICUBIC).save(Path(folder) / f"{i}.jpg")
        for low_res in LOW_RES.value:
            rates = []
            for _ in range(TURNS):
                turn = []
                for workers in (0, WORKERS.value):
                    batches = batches_of(folder, low_res, workers)
                    turn.append(rate(batches))
                    batches.close()
                rates.append(turn)
            threads, processes = np.median(rates, 0)
            ratio = np.median([there / here for here, there in rates])
            print(
                f"{low_res or 'plain'}: threads {threads:.0f}, {WORKERS.value} processes "
                f"{processes:.0f} pictures/s on {os.cpu_count()} cores; ratio {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
