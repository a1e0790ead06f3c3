"""A device's one thread: whatever waits when it comes back is one batch, as in hat_runtime/device/worker.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from fleet.costs import DeviceCost
from fleet.events import Events

BATCH_TOKENS = 512
"""Rows after which no more jobs join a pass."""


class Job(ABC):
    """Rows of one session for the input layers, after which it may draft."""

    judged = 0
    """Deep states that the head is to judge first."""
    rows = 0
    """For the next pass of the input layers."""
    total = 0
    """Tokens of the text when that pass is over."""
    drafting = False
    """After the input layers the drafter is asked."""
    draft_from = -1.0
    """When that was the first time, in simulated seconds; below 0: not yet."""

    @abstractmethod
    def begin(self) -> None:
        """Its first pass starts: judge, and say what the input layers get."""

    @abstractmethod
    def drafted(self) -> None:
        """The drafter has answered: say what the next pass gets."""

    @abstractmethod
    def done(self) -> None:
        """No pass follows."""


class Worker:
    """Runs jobs in the order of their submission, as many at once as a pass may hold."""

    def __init__(self, events: Events, cost: DeviceCost) -> None:
        self._events = events
        self._cost = cost
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._busy = False

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append(job)
        if not self._busy:
            self._run()

    def _run(self) -> None:
        jobs = self._running
        new: list[Job] = []
        size = sum(max(1, job.rows) for job in jobs)
        while self._waiting:
            job = self._waiting[0]
            rows = max(1, job.rows)
            if (jobs or new) and size + rows > BATCH_TOKENS:
                break
            size += rows
            new.append(self._waiting.popleft())
        jobs = jobs + new
        if not jobs:
            return
        self._busy = True
        judged = sum(job.judged for job in new)
        for job in new:
            job.begin()
        rows = sum(job.rows for job in jobs)
        took_s = self._cost.head.seconds(judged, 0) if judged else 0.0
        if rows:
            shallow = self._cost.shallow
            took_s += shallow.fixed_s + sum(
                shallow.seconds(job.rows, job.total) - shallow.fixed_s for job in jobs if job.rows
            )
        drafting = [job for job in jobs if job.drafting]
        if drafting:
            for job in drafting:
                if job.draft_from < 0:
                    job.draft_from = self._events.now + took_s
            took_s += self._cost.draft_s
        self._events.at(self._events.now + took_s, self._finish, jobs, drafting)

    def _finish(self, jobs: list[Job], drafting: list[Job]) -> None:
        over = [job for job in jobs if not job.drafting]
        for job in drafting:
            job.drafted()
        self._running = drafting
        for job in over:
            job.done()
        self._busy = False
        self._run()
