"""Time to first image: from the start of a fresh process to one guided sample, decoded.

python -m benchmarks.first_image SIDE FOLDER DEVICE QUICK PYTHON   # what the benchmark starts
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.measure import Setting, ratios, set_up


def compare(sides: tuple[str, ...], setting: Setting) -> dict[str, Any]:
    """The row `first_image`: with the programs compiled before, and `ours_cold_seconds` without."""
    rounds = 1 if setting.quick else 3
    with tempfile.TemporaryDirectory() as cache:
        cold = _seconds("ours", setting, cache)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                seconds[side].append(_seconds(side, setting, cache))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    row = {"name": "first_image", **ratios(medians), "rounds": rounds}
    return row | {"ours_cold_seconds": cold}


def _seconds(side: str, setting: Setting, cache: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        setting.command(__spec__.name, side),
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        check=True,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    its_side, *its_setting = sys.argv[1:]
    setting = Setting.read(*its_setting)
    image = set_up(its_side, setting.device).first_image(setting.folder, setting.quick)
    assert image.shape[-1] == 3
