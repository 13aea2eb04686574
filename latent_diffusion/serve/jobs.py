"""The queue of requests. Similar requests share a program call, which has progress and previews."""

import collections
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latent_diffusion.generation.model import Model
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.serve.parameters import to_png
from latent_diffusion.serve.requests import Limits, Request, call

log = logging.getLogger(__name__)

REMEMBERED = 128  # jobs whose pictures can still be fetched after they have ended
REMEMBERED_BYTES = 2**29  # of these pictures, at most; the last ones stay in any case
PREVIEW_SECONDS = 0.25  # between two previews


class Busy(Exception):
    """Too many requests are waiting."""


class Cancelled(Exception):
    """All requests of a running call have been cancelled."""


class Job:
    """A request and its progress. state: waiting, running, done, failed or cancelled.

    evaluations: the network's so far. preview: PNG bytes of the last preview. pictures:
    PNG bytes of each image. version: a number that grows with every change.
    """

    def __init__(self, request: Request):
        self.id = secrets.token_hex(8)
        self.request = request
        self.state = "waiting"
        self.created = time.monotonic()
        self.seconds = 0.0  # from the request to its end
        self.evaluations = 0
        self.preview: bytes | None = None
        self.pictures: list[bytes] = []
        self.error = ""
        self.version = 0

    @property
    def ended(self) -> bool:
        """Whether the job won't change any more."""
        return self.state in ("done", "failed", "cancelled")


class Jobs:
    """A model behind a queue, and the thread that samples.

    batch_size: the largest number of images of a program call. counts: events since the start.
    """

    def __init__(self, model: Model, name: str, limits: Limits, batch_size: int = 16):
        self.model, self.name, self.limits, self.batch_size = model, name, limits, batch_size
        self.counts: collections.Counter[str] = collections.Counter()
        self.changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: list[Job] = []
        self._closed = False
        self._latents: np.ndarray | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True)]
        if model.prior is None:
            self._threads.append(threading.Thread(target=self._draw_previews, daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads; a running call is cancelled."""
        with self.changed:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                if not job.ended:
                    self._end(job, "cancelled")
            self.changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def num_waiting(self) -> int:
        """The number of waiting requests."""
        return len(self._waiting)

    def submit(self, request: Request) -> Job:
        """Queue a request. Raises Busy if the queue is full."""
        with self.changed:
            if len(self._waiting) >= self.limits.max_waiting:
                self.counts["refused"] += 1
                raise Busy(f"{len(self._waiting)} requests wait already; try again later")
            job = Job(request)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self.counts["requests"] += 1
            self.changed.notify_all()
        return job

    def find(self, job_id: str) -> Job | None:
        """The job with an identifier, or None if it is unknown or was removed."""
        return self._jobs.get(job_id)

    def cancel(self, job: Job) -> None:
        """End a job. A call whose jobs have all ended stops at the network's next evaluation."""
        with self.changed:
            if job.ended:
                return
            if job in self._waiting:
                self._waiting.remove(job)
            self._end(job, "cancelled")

    def wait(self, job: Job, seconds: float | int, version: int | None = None) -> bool:
        """Wait until a job has ended or has another `version`; returns whether that happened."""
        with self.changed:
            return self.changed.wait_for(
                lambda: job.ended or (version is not None and job.version != version), seconds
            )

    # ------------------------------------------------------------- called by the running call

    def progress(self, t: Any) -> None:
        """An option of `Model.sample`: count an evaluation; stop if all jobs have ended."""
        with self.changed:
            for job in self._running:
                job.evaluations += 1
                job.version += 1
            self.changed.notify_all()
            if all(job.ended for job in self._running):
                raise Cancelled

    def preview(self, t: Any, z_0: Any) -> None:
        """An option of `Model.sample`: store the latest estimate of the latents."""
        with self.changed:
            self._latents = np.asarray(z_0)
            self.changed.notify_all()

    # ------------------------------------------------------------------------------ the threads

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = self._next()
                for job in self._running:
                    job.state = "running"
                    job.version += 1
                # A job that is cancelled from now on loses its request, which others may share.
                batch = [(job, job.request) for job in self._running]
                self.changed.notify_all()
            self._sample(batch)
            with self.changed:
                self._running, self._latents = [], None

    def _next(self) -> list[Job]:
        """The job that has waited longest, and others that can share its call."""
        first = self._waiting.popleft()
        batch, images = [first], first.request.num_images
        for job in list(self._waiting):
            more = job.request.num_images
            if job.request.group == first.request.group and images + more <= self.batch_size:
                self._waiting.remove(job)
                batch.append(job)
                images += more
        return batch

    def _sample(self, batch: Sequence[tuple[Job, Request]]) -> None:
        jobs, requests = zip(*batch, strict=True)
        try:
            pictures = self._pictures(requests)
        except Exception as error:  # after any error, the next request must be answered
            if all(job.ended for job in jobs):
                return
            if len(batch) > 1:  # a request with an error must not affect the others
                for job, request in batch:
                    if not job.ended:
                        with self.changed:
                            self._running, self._latents = [job], None
                        self._sample([(job, request)])
                return
            expected = isinstance(error, ValueError | OverflowError | MemoryError)
            if not expected:
                log.exception("sampling failed")
            with self.changed:
                jobs[0].error = str(error).partition("\n")[0][:500] or type(error).__name__
                self._end(jobs[0], "failed")
            return
        with self.changed:
            self.counts["calls"] += 1
            for job, of_job in zip(jobs, pictures, strict=True):
                self.counts["images"] += len(of_job)
                if not job.ended:
                    job.pictures = of_job
                    self._end(job, "done")

    def _pictures(self, requests: Sequence[Request]) -> list[list[bytes]]:
        """The PNGs of each request, which contain the settings that reproduce them."""
        arguments = call(self.model, requests)
        if self.model.prior is None:
            arguments |= {"progress": self.progress, "preview": self.preview}
        images = iter(to_uint8(self.model.sample(**arguments, batch_size=self.batch_size)))
        return [
            [
                to_png(
                    next(images),
                    {**each.settings, "image_index": i},
                    self.name,
                    self.model.defaults,
                )
                for i in range(each.num_images)
            ]
            for each in requests
        ]

    def _end(self, job: Job, state: str) -> None:
        job.state, job.preview = state, None
        job.request = dataclasses.replace(job.request, values={}, pictured={})  # frees pictures
        job.seconds = time.monotonic() - job.created
        job.version += 1
        self.counts[state] += 1
        self._forget()
        self.changed.notify_all()

    def _forget(self) -> None:
        """Remove the jobs that ended first, if many have ended or their pictures are large."""
        ended = [job for job in self._jobs.values() if job.ended]
        ended.sort(key=lambda job: job.created + job.seconds, reverse=True)
        num_bytes = 0
        for count, job in enumerate(ended):
            later_bytes, num_bytes = num_bytes, num_bytes + sum(map(len, job.pictures))
            if count >= REMEMBERED or (later_bytes and num_bytes > REMEMBERED_BYTES):
                del self._jobs[job.id]

    def _draw_previews(self) -> None:
        """Decode the latest latents from time to time, while the call runs."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._latents is not None or self._closed)
                if self._closed:
                    return
                latents, self._latents = self._latents, None
                running = list(self._running)
            try:
                self._draw(latents, running)
            except Exception as error:  # such as too little memory; the pictures may still be made
                log.warning("a preview failed: %s", error)
            time.sleep(PREVIEW_SECONDS)

    def _draw(self, latents: Any, running: Sequence[Job]) -> None:
        """Set each job's preview to its first picture, if the latents include those of all jobs.

        `Model.sample` may compute the images of a call in parts. Pictures that are made in tiles
        are decoded in tiles.
        """
        if len(running) > 1 and len(latents) < sum(job.request.num_images for job in running):
            return
        start = 0
        for job in running:
            z_0 = jnp.asarray(latents[start : start + 1])
            options = {**self.model.defaults, **job.request.shared}
            tiles = {name: options.get(name) for name in ("tile_size", "tile_overlap")}
            image = to_uint8(np.asarray(self.model.decode(z_0, **tiles)))[0]
            start += job.request.num_images
            with self.changed:
                if not job.ended:
                    job.preview = to_png(image, {}, self.name, {})
                    job.version += 1
                    self.changed.notify_all()
