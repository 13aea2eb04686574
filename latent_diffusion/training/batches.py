"""The batches of a run, which depend on its seed and the step."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from latent_diffusion import data
from latent_diffusion.runtime import parallel


def train_batches(
    config: ConfigDict,
    source: Any,
    transform: Any = None,
    start_step: int = 0,
    parts: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """This process's part of every batch from `start_step` on; pictures are bytes.

    source: the training examples; `data.Bucketed` decides their order. transform: by default that
    of the config, without texts. parts: number of sources that share a batch equally. workers: as
    in `data.iterate`.
    """
    mode, mesh = parallel.devices(config.parallel)
    index, count = parallel.process_shard(mode, mesh)
    ordered = isinstance(source, data.Bucketed)
    return data.iterate(
        source,
        transform or data.make_transform(config.data, train=True, as_bytes=True),
        batch_size=config.batch_size // parts,
        seed=config.seed,
        start_step=start_step,
        shuffle=not ordered,
        repeat=not ordered,
        process_index=index,
        process_count=count,
        workers=workers,
    )
