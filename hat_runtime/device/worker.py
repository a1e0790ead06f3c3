"""The one thread that computes for all sessions of a device.

One thread, because torch keeps an OpenMP team per calling thread, and because whatever waits when the thread comes back
is one batch: the head over all rows at once, then the input layers over all new tokens at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hat_runtime.device.sampling import SamplingParams, sample
from hat_runtime.errors import HatError
from hat_runtime.model.hf import DeviceEnds
from hat_runtime.model.pages import OutOfPages, PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment

log = logging.getLogger(__name__)

_BATCH_TOKENS = 512
"""New tokens after which the worker stops collecting jobs for one pass, so that short jobs do not wait long."""


class DeviceFull(HatError):
    """The device's KV pages cannot hold the session; others must end first."""


@dataclass(frozen=True)
class Advanced:
    """One decoding step on the device."""

    token_id: int
    hidden: torch.Tensor | None
    """Shallow state [1, hidden_size] of the new token; None for a stop token or where none was asked for."""


@dataclass(eq=False)
class Job:
    """New tokens of one session: their ids are known, or the head finds them."""

    sequence: PagedSequence
    future: asyncio.Future[Any]
    ids: list[int] = field(default_factory=list)
    start: int = 0
    deep: torch.Tensor | None = None
    """[1, hidden_size] where the job begins with head and sampling: its token becomes `ids`."""
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    embed_new: bool = True


class Worker:
    """Runs jobs in the order of their submission, as many at once as a pass may hold."""

    def __init__(self, ends: DeviceEnds, runner: LayerRunner) -> None:
        self.shallow_s_per_token = 0.0
        """Duration of the latest input pass of at least 16 tokens, per token."""
        self._ends = ends
        self._runner = runner
        self._queue: queue.SimpleQueue[list[Job] | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="hat-device-model", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs; each job's future gets its result, on its own event loop."""
        self._queue.put(jobs)

    def call(self, function: Callable[[], None]) -> None:
        """Queue a function that must not raise, to be run between passes."""
        self._queue.put(function)

    def stop(self) -> None:
        """End the thread after what is queued, and wait for it."""
        self._queue.put(None)
        self._thread.join()

    # Everything below runs on the worker thread.

    @torch.inference_mode()
    def _work(self) -> None:
        waiting: deque[Job | Callable[[], None] | None] = deque()
        while True:
            self._collect(waiting)
            jobs: list[Job] = []
            while waiting and isinstance(head := waiting[0], Job) and self._fits(head, jobs):
                waiting.popleft()
                if not head.future.cancelled():
                    jobs.append(head)
            if jobs:
                self._run_safely(jobs)
            elif waiting and not isinstance(head := waiting.popleft(), Job):
                if head is None:
                    return
                head()

    def _collect(self, waiting: deque[Job | Callable[[], None] | None]) -> None:
        """Take over everything that is in the queue; wait for something only if there is nothing to do."""
        while not waiting or not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, list):
                waiting.extend(item)
            else:
                waiting.append(item)

    @staticmethod
    def _fits(job: Job, jobs: list[Job]) -> bool:
        # A second job of one sequence, left by a cancelled request, needs a pass of its own.
        return not jobs or (
            sum(max(1, len(other.ids)) for other in jobs) + len(job.ids) <= _BATCH_TOKENS
            and all(other.sequence is not job.sequence for other in jobs)
        )

    def _run_safely(self, jobs: list[Job]) -> None:
        try:
            self._run(jobs)
        except Exception as error:
            log.exception("a pass over %d sessions failed on the device", len(jobs))
            deliver([(job.future, error) for job in jobs])

    def _run(self, jobs: list[Job]) -> None:
        self._sample([job for job in jobs if job.deep is not None])
        results: dict[int, Any] = {}
        running: list[Job] = []
        for job in jobs:
            if not job.embed_new:
                results[id(job)] = Advanced(job.ids[0], None)
                continue
            try:
                self._make_room(job)
                running.append(job)
            except OutOfPages as error:
                results[id(job)] = DeviceFull(
                    f"the device's KV cache is full: {job.start + len(job.ids)} tokens do not fit ({error}); "
                    "end other sessions or raise the device's KV tokens"
                )
        for job, hidden in zip(running, self._input_pass(running), strict=True):
            results[id(job)] = hidden if job.deep is None else Advanced(job.ids[0], hidden)
        deliver([(job.future, results[id(job)]) for job in jobs])

    def _sample(self, jobs: list[Job]) -> None:
        """Head and sampling: fills in `ids`, and clears `embed_new` where a stop token came."""
        if not jobs:
            return
        logits = self._ends.head(torch.cat([job.deep for job in jobs if job.deep is not None]))
        for job, row in zip(jobs, logits, strict=True):
            token = sample(row, job.params, job.start)
            job.ids = [token]
            job.embed_new = job.embed_new and token not in job.stop_ids

    def _make_room(self, job: Job) -> None:
        if job.start < job.sequence.length:
            self._runner.cache.truncate(job.sequence, job.start)
        self._runner.cache.reserve(job.sequence, job.start + len(job.ids))

    def _input_pass(self, jobs: list[Job]) -> list[torch.Tensor]:
        if not jobs:
            return []
        began = time.perf_counter()
        embedded = self._ends.embed(torch.tensor([token for job in jobs for token in job.ids]))
        parts: tuple[torch.Tensor, ...] = embedded.split([len(job.ids) for job in jobs])  # type: ignore[no-untyped-call]
        hidden = self._runner.run(
            [Segment(job.sequence, job.start, part) for job, part in zip(jobs, parts, strict=True)]
        )
        if len(embedded) >= 16:
            self.shallow_s_per_token = (time.perf_counter() - began) / len(embedded)
        return hidden


def deliver(results: list[tuple[asyncio.Future[Any], Any]]) -> None:
    """Hand results (or exceptions) to the event loop: one wake-up for the whole batch."""

    def resolve() -> None:
        for future, result in results:
            if future.done():  # its request was cancelled
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    try:
        results[0][0].get_loop().call_soon_threadsafe(resolve)
    except RuntimeError:
        log.debug("a result came after its event loop was closed")
