"""The figures of the answers under way and of the latest ones: what people look at, not what Prometheus counts."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from hat_runtime.device.request import GenerationStats

KEPT = 64
"""Answers that are remembered after their end."""


@dataclass(frozen=True)
class EndedAnswer:
    """One that is over, however."""

    number: int
    """1 for the device's first; never used twice."""
    ended_s: float
    """time.monotonic() of its end."""
    stats: GenerationStats


class RecentAnswers:
    """A bounded memory. For the event loop's thread."""

    def __init__(self, kept: int = KEPT) -> None:
        self._ended: deque[EndedAnswer] = deque(maxlen=kept)
        self._running: list[GenerationStats] = []
        self.count = 0
        """Answers that have ended so far: the number of the last one."""

    @property
    def running(self) -> list[GenerationStats]:
        """Figures so far of the answers under way, the oldest first."""
        return list(self._running)

    def began(self, stats: GenerationStats) -> None:
        """An answer is under way; its figures are kept up to date by whoever generates it."""
        self._running.append(stats)

    def ended(self, stats: GenerationStats) -> None:
        """It is over."""
        self._running = [other for other in self._running if other is not stats]
        self.count += 1
        self._ended.append(EndedAnswer(self.count, time.monotonic(), stats))

    def after(self, number: int = 0) -> list[EndedAnswer]:
        """The remembered answers with a higher number, the oldest first."""
        return [answer for answer in self._ended if answer.number > number]

    def latest(self) -> GenerationStats | None:
        """Of the answer that began last of those under way, else of the one that ended last."""
        if self._running:
            return self._running[-1]
        return self._ended[-1].stats if self._ended else None

    def tokens_a_round(self) -> float | None:
        """Mean over all remembered answers; None while the cloud has sent nothing back."""
        every = [answer.stats for answer in self._ended] + self._running
        rounds = sum(stats.rounds for stats in every)
        return sum(stats.completion_tokens for stats in every) / rounds if rounds else None
