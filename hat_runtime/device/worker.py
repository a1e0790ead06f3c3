"""The one thread that computes for all sessions of a device.

One thread, because torch keeps an OpenMP team per calling thread, and because whatever waits when the thread comes back
is one batch: the head over all checked rows at once, then the input layers over all new tokens at once, then the
drafter. A job that drafts takes several such passes; jobs that arrive meanwhile join the next one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from hat_runtime.control.cost import CostFit
from hat_runtime.device.drafting.base import Drafter
from hat_runtime.device.jobs import DeviceFull, Job, TurnJob
from hat_runtime.model.hf import DeviceEnds
from hat_runtime.model.pages import OutOfPages
from hat_runtime.model.runner import LayerRunner, Segment

log = logging.getLogger(__name__)

_BATCH_TOKENS = 512
"""New tokens after which the worker stops collecting jobs for one pass, so that short jobs do not wait long."""


class Worker:
    """Runs jobs in the order of their submission, as many at once as a pass may hold."""

    def __init__(self, ends: DeviceEnds, runner: LayerRunner, drafter: Drafter | None = None) -> None:
        self.shallow_s_per_token = 0.0
        """Duration of the latest input pass of at least 16 tokens, per token."""
        self.shallow_cost = CostFit()
        """Of input passes."""
        self._ends = ends
        self._runner = runner
        self._drafter = drafter
        self._queue: queue.SimpleQueue[list[Job] | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="hat-device-model", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs; each job's future gets its result, on its own event loop."""
        self._queue.put(jobs)

    def call(self, function: Callable[[], None]) -> None:
        """Queue a function to be run between passes; what it raises is only logged."""
        self._queue.put(function)

    def stop(self) -> None:
        """End the thread after what is queued, and wait for it."""
        self._queue.put(None)
        self._thread.join()

    # Everything below runs on the worker thread.

    @torch.inference_mode()
    def _work(self) -> None:
        waiting: deque[Job | Callable[[], None] | None] = deque()
        running: list[Job] = []  # jobs in the middle of their drafts
        while True:
            self._collect(waiting, block=not running)
            new: list[Job] = []
            while waiting and isinstance(head := waiting[0], Job) and self._fits(head, running + new):
                waiting.popleft()
                if not head.future.cancelled():
                    new.append(head)
            if running or new:
                running = self._run_safely(running, new)
            elif waiting and not isinstance(head := waiting.popleft(), Job):
                if head is None:
                    return
                try:
                    head()
                except Exception:
                    log.exception("a function failed on the device's worker")

    def _collect(self, waiting: deque[Job | Callable[[], None] | None], *, block: bool) -> None:
        """Take over everything that is in the queue; wait for something only if there is nothing to do."""
        while (block and not waiting) or not self._queue.empty():
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

    def _run_safely(self, running: list[Job], new: list[Job]) -> list[Job]:
        """One pass; the jobs that need another one."""
        jobs = [job for job in running if not job.future.cancelled()] + new
        try:
            return self._run(jobs, new)
        except Exception as error:
            log.exception("a pass over %d sessions failed on the device", len(jobs))
            if waiting := [(job.future, error) for job in jobs if not job.delivered]:
                deliver(waiting)
            return []

    def _run(self, jobs: list[Job], new: list[Job]) -> list[Job]:
        self._judge([job for job in new if isinstance(job, TurnJob) and job.deep is not None])
        results: list[tuple[Job, Any]] = []
        ready: list[Job] = []
        for job in jobs:
            if not job.ids:
                ready.append(job)
                continue
            try:
                self._make_room(job)
                ready.append(job)
            except OutOfPages as error:
                if isinstance(job, TurnJob):
                    job.no_room()
                    results.append((job, job.result()))
                else:
                    results.append((job, self._device_full(job, error)))
        embedding = [job for job in ready if job.ids]
        for job, hidden in zip(embedding, self._input_pass(embedding), strict=True):
            job.embedded(hidden)
        self._finish(embedding)
        results += [(job, job.result()) for job in ready if not job.wants_draft]
        drafting = [job for job in ready if isinstance(job, TurnJob) and job.wants_draft]
        going_on = self._draft(drafting, results)
        for job, _ in results:
            job.delivered = True
        if results:
            deliver([(job.future, result) for job, result in results])
        return list(going_on)

    def _finish(self, jobs: list[Job]) -> None:
        """What else jobs need of their shallow states; for other kinds of workers."""

    def _judge(self, jobs: list[TurnJob]) -> None:
        """Head and sampling: which drafts stay, and the token behind them."""
        if not jobs:
            return
        normed = self._ends.final_norm(torch.cat([job.deep for job in jobs if job.deep is not None]))
        logits = self._ends.logits(normed)
        first = 0
        for job in jobs:
            assert job.deep is not None
            rows = slice(first, first + len(job.deep))
            job.judge(logits[rows], normed[rows])
            first = rows.stop
        if early := [(job.told, job.tokens) for job in jobs if job.told is not None]:
            deliver(early)

    def _draft(self, jobs: list[TurnJob], results: list[tuple[Job, Any]]) -> list[TurnJob]:
        """One more draft for each job; those that have enough now get their result."""
        if not jobs:
            return []
        assert self._drafter is not None
        now = time.perf_counter()
        for job in jobs:
            job.draft_from = job.draft_from or now
        going_on = []
        for job, draft in zip(jobs, self._drafter.propose([job.wish() for job in jobs]), strict=True):
            if draft is not None and job.drafted(draft):
                going_on.append(job)
            else:
                results.append((job, job.result()))
        return going_on

    def _make_room(self, job: Job) -> None:
        if job.start < job.sequence.length:
            self._runner.cache.truncate(job.sequence, job.start)
        self._runner.cache.reserve(job.sequence, job.start + len(job.ids) + len(job.aside))

    @staticmethod
    def _device_full(job: Job, error: OutOfPages) -> DeviceFull:
        return DeviceFull(
            f"the device's KV cache is full: {job.start + len(job.ids)} tokens do not fit ({error}); "
            "end other sessions or raise the device's KV tokens"
        )

    def _input_pass(self, jobs: list[Job]) -> list[torch.Tensor]:
        if not jobs:
            return []
        began = time.perf_counter()
        embedded = self._ends.embed(torch.tensor([token for job in jobs for token in [*job.ids, *job.aside]]))
        rows = [len(job.ids) + len(job.aside) for job in jobs]
        parts: tuple[torch.Tensor, ...] = embedded.split(rows)  # type: ignore[no-untyped-call]
        hidden = self._runner.run(
            [
                Segment(job.sequence, job.start, part, aside=(job.start,) * len(job.aside))
                for job, part in zip(jobs, parts, strict=True)
            ]
        )
        took_s = time.perf_counter() - began
        pairs = sum(count * (job.start + count) for job, count in zip(jobs, rows, strict=True))
        self.shallow_cost.observe(len(embedded), pairs, took_s)
        if len(embedded) >= 16:
            self.shallow_s_per_token = took_s / len(embedded)
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
