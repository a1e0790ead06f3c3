"""A device of a fleet: its thread, its link, and what it has learnt."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fleet.answer import Answer, Record
from fleet.costs import DeviceCost
from fleet.events import Events
from fleet.guesses import DrawnGuesses, Guesses, RecordedGuesses
from fleet.link import Direction
from fleet.pod import Pod
from fleet.worker import Worker
from fleet.workload import Request
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.device.chunking import ChunkConfig, Chunker
from hat_runtime.device.estimates import CloudView
from hat_runtime.device.policy import DraftConfig, DraftPolicy
from hat_runtime.device.steps import Binding
from hat_runtime.model.split import LayerRange


@dataclass(frozen=True)
class Way:
    """How devices and cloud work: a row of a table."""

    name: str
    chunking: ChunkConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    drafting: DraftConfig | None = None
    """None: without drafts."""


@dataclass(frozen=True)
class LinkRates:
    """A device's link."""

    up_bytes_s: float
    down_bytes_s: float
    rtt_s: float


class Device:
    """Answers its requests as they come, or one after the other."""

    def __init__(
        self,
        events: Events,
        pod: Pod,
        cost: DeviceCost,
        link: LinkRates,
        way: Way,
        *,
        hidden_size: int,
        acceptance: float,
        seed: str,
        on_end: Callable[[Record], None],
        one_by_one: bool = False,
    ) -> None:
        """Make an idle device.

        Args:
            events: the clock.
            pod: where its sessions run.
            cost: of its passes.
            link: between it and the pod.
            way: how it works.
            hidden_size: a shallow state has 2 bytes for each.
            acceptance: mean confidence of a draft (fleet.guesses.mean_acceptance).
            seed: of its drafts.
            on_end: gets each request's record.
            one_by_one: a request waits for those before it, and its times count from when they are over.
        """
        self.events, self.pod, self.cost = events, pod, cost
        delay_s = link.rtt_s / 2 + cost.step_s
        self.up = Direction(events, link.up_bytes_s, delay_s)
        self.down = Direction(events, link.down_bytes_s, delay_s)
        self.worker = Worker(events, cost)
        self.view = CloudView()
        binding = Binding("", LayerRange(0, 1), torch.bfloat16, hidden_size)
        self.row_bytes = binding.encoding(False).row_bytes(hidden_size, torch.bfloat16)
        self.chunker = Chunker(way.chunking, self.view, binding)
        self.policy = DraftPolicy(way.drafting or DraftConfig(), way.drafting is not None)
        self.waiting = 0
        """Answers that wait for the cloud (DeviceModel.rounds_in_flight)."""
        self._name = seed
        self._acceptance = acceptance
        self._rng = random.Random(seed)
        self._on_end = on_end
        self._one_by_one = one_by_one
        self._queued: deque[Request] = deque()
        self._taken = self._active = 0

    def ask(self, request: Request) -> None:
        """A request has come."""
        self._queued.append(request)
        if not (self._one_by_one and self._active):
            self._take()

    def ended(self, record: Record) -> None:
        """One of its answers is over."""
        self._active -= 1
        self._on_end(record)
        if self._queued:
            self._take()

    def _take(self) -> None:
        request = self._queued.popleft()
        self._active += 1
        self._taken += 1
        guesses: Guesses = DrawnGuesses(self._acceptance, self._rng)
        if request.rounds:
            guesses = RecordedGuesses(request.rounds)
        Answer(self, request, f"{self._name}/{self._taken}", guesses).begin()
