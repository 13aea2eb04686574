"""Memory and speed of a folder of latents with ten million examples.

    python -m benchmarks.shards [--examples=10000000] [--shard_size=4096]

Writes one small shard, to which the names of all others are links, reads examples in the order of
training, and prints the memory that the process has grown by, and examples/s on this machine.
"""

import itertools
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl import app, flags

from latent_diffusion import data
from latent_diffusion.data import shards
from latent_diffusion.data.folders import Folder

EXAMPLES = flags.DEFINE_integer("examples", 10_000_000, "In all shards together.")
SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Examples in a shard.")
BATCH, BATCHES = 256, 100


def write(folder: Path, examples: int, shard_size: int) -> None:
    """A folder whose shards are all the same file."""
    crop = {"window": [0, 0, 1, 1], "mirrors": [{"moments": np.zeros((2, 2, 8), np.float32)}]}
    first = folder / shards.shard_name(0)
    shards.write_shard(
        Folder(folder), first.name, ({"caption": "a", "crops": [crop]} for _ in range(shard_size))
    )
    count, size = examples // shard_size, first.stat().st_size
    names = [shards.shard_name(number) for number in range(count)]
    for name in names[1:]:
        os.link(first, folder / name)
    listed = [shards.Shard(name, shard_size, size) for name in names]
    shards.write_index(Folder(folder), {"examples": count * shard_size}, listed)


def resident() -> float:
    """The most memory that this process has had, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(argv: list[str]) -> None:
    """Write, read, print."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), EXAMPLES.value, SHARD_SIZE.value)
        before, begin = resident(), time.perf_counter()
        source = shards.ShardSource(Folder(name))
        opened = time.perf_counter() - begin
        fields = SimpleNamespace(crop="none", image_size=16, flip=False, sizes=False, get={}.get)
        transform = data.make_transform(fields, train=True)
        batches = data.iterate(source, transform, batch_size=BATCH, seed=0)
        begin, used = time.perf_counter(), time.process_time()
        for _ in itertools.islice(batches, BATCHES):
            pass
        rate = BATCH * BATCHES / (time.perf_counter() - begin)
        per_core = BATCH * BATCHES / (time.process_time() - used)
        print(
            f"{len(source):,} examples in {len(source.shards):,} shards: opened in {opened:.2f} s, "
            f"{resident() - before:.0f} MiB more, {rate:,.0f} examples/s, {per_core:,.0f} a core"
        )


if __name__ == "__main__":
    app.run(main)
