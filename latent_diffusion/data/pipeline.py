"""Make batches from a source, with Grain.

Batch number s is a pure function of (seed, s): examples s·B ... (s+1)·B − 1 of the endlessly
repeated source, reshuffled every epoch. Process p of P takes the p-th contiguous block of every
batch, so the position in the data is the step alone: a run resumes with `start_step`, and the
numbers of processes, threads and workers don't change the batch of step s.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from latent_diffusion.data.contract import check_batch
from latent_diffusion.data.sources import Example, Source
from latent_diffusion.data.transforms import Transform

Batch = dict[str, np.ndarray]
MOST_AHEAD = 2**30  # bytes of batches that wait for their steps; one batch may always wait


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not divisible by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count} processes")
    return batch_size // process_count


def _prefetched(batches: grain.MapDataset, workers: int = 0) -> Iterator[Batch]:
    """Batches in order, made ahead by a few threads; the first one is checked by the contract.

    workers: number of processes that take turns in making all further batches.
    """
    if not len(batches):
        return
    first = batches[0]
    check_batch(first)
    yield first
    size = sum(array.nbytes for array in first.values())
    ahead = int(min(max(MOST_AHEAD // size, 1), 16))
    threads = max((os.cpu_count() or 1) // max(workers, 1), 1)
    ahead = max(ahead // max(workers, 1), 1)
    options = grain.ReadOptions(min(threads, ahead), prefetch_buffer_size=ahead)
    following = batches[1:].to_iter_dataset(options)
    if not workers:
        yield from following
        return
    if not flags.FLAGS.is_parsed():  # outside of commands; Grain reads its flags
        flags.FLAGS.mark_as_parsed()
    processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
    iterator = iter(following.mp_prefetch(processes, _worker_starts))
    try:
        yield from iterator
    finally:
        iterator.close()


def _worker_starts(index: int, count: int) -> None:
    """Ignore signals in workers: the main process handles them, and ends them after its last step.

    Schedulers send SIGTERM to all processes of a job, and a last step may need another batch.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the main process has ended, also if it was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def iterate(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Training batches from step `start_step` on: dicts of arrays [batch_size / process_count ...].

    batch_size: that of the global batch. transform: `(example, rng) -> example`; rng depends on
    (seed, position). repeat: endlessly; otherwise one epoch of whole batches. workers: number of
    processes that make batches, with copies of source and transform; batches don't depend on it.
    Raises ValueError for a batch size that the processes cannot share, or that exceeds the source.
    """
    local = _local_batch_size(batch_size, process_index, process_count)
    if len(source) < batch_size:
        raise ValueError(
            f"the data has {len(source)} examples, fewer than one batch: {batch_size}; "
            f"add examples, or set batch_size to {len(source)} or less"
        )
    examples = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        examples = examples.shuffle()
    # Cut to whole global batches, so that every process sees the same number of them.
    examples = examples.repeat() if repeat else examples[: len(source) // batch_size * batch_size]
    batches = examples.random_map(transform).batch(local, drop_remainder=True)
    local_batches = batches[start_step * process_count + process_index :: process_count]
    return _prefetched(local_batches, workers)


class _Padded:
    """`count` evenly spaced examples of a source, padded to `length` by the last with weight 0."""

    def __init__(self, source: Source, count: int, length: int):
        self.source, self.count, self.length = source, count, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        place = min(index, self.count - 1) * len(self.source) // self.count
        return {**self.source[place], "weight": np.float32(index < self.count)}


def epoch(
    source: Source,
    transform: Transform,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_batches: int | None = None,
) -> Iterator[Batch]:
    """Every example once, in order. `weight` [B] is 1, or 0 for the padding of the last batch.

    batch_size: that of the global batch, of which each process gets a contiguous block.
    num_batches: at most so many, of evenly spaced examples.
    """
    local = _local_batch_size(batch_size, process_index, process_count)
    if len(source) == 0:
        raise ValueError("the data has no examples")
    most = len(source) if num_batches is None else num_batches * batch_size
    count = min(len(source), most)
    padded = _Padded(source, count, -(-count // batch_size) * batch_size)

    def weighted(example: Example, rng: np.random.Generator) -> Example:
        return {**transform(example, rng), "weight": example["weight"]}

    batches = grain.MapDataset.source(padded).seed(0).random_map(weighted).batch(local)
    return _prefetched(batches[process_index::process_count])
