"""What a Step meets in the cloud: how long it waits, and how many rows of others share its pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

PAST = 0.95
"""Weight of the past at each Step: the last twenty or so count, of whatever session."""
IDLE_S = 10.0
"""Without a Step for so long there is no load."""
SLOW = 0.95
"""The share of Steps that are not slow."""
MOST_STEPS = 512
"""The latest ones, of which the slow ones are told."""


class Load:
    """Moving averages over the Steps of all sessions."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._wait_s = 0.0
        self._company = 0.0
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=MOST_STEPS)
        """When, how long, and how long by the model; in seconds."""
        self.rows = 1.0
        """Of a Step that decodes, moving average."""

    def observe(self, wait_s: float | None, company: int) -> None:
        """A Step was answered.

        Args:
            wait_s: from its arrival to its answer, without its own passes; None: it had to wait for its own session.
            company: rows of other sessions in its last pass.
        """
        busy = self._current()
        past = PAST if busy else 0.0
        self._last = self._clock()
        if wait_s is not None:
            self._wait_s = past * self._wait_s + (1 - past) * wait_s
        elif not busy:
            self._wait_s = 0.0
        self._company = past * self._company + (1 - past) * company

    def saw_step(self, rows: int, seconds: float, model_s: float) -> None:
        """A Step of an answer, the only one of its session, was answered.

        Args:
            rows: its tokens and alternatives.
            seconds: from its arrival to its answer.
            model_s: what the model says of a pass with a Step of everybody who talks; 0: there is no model yet.
        """
        past = PAST if self._lately() else 0.0
        self.rows = past * self.rows + (1 - past) * rows
        self._steps.append((self._clock(), seconds, model_s))

    def slow_step_s(self) -> float:
        """What the slowest twentieth of the Steps of answers takes at least, in seconds; 0 while there are none."""
        return _slow(seconds for _, seconds, _ in self._lately())

    def stretch(self) -> float:
        """The same as a multiple of what the model says; 1 while there are none, or no model."""
        return _slow(seconds / model_s for _, seconds, model_s in self._lately() if model_s) or 1.0

    def figures(self) -> dict[str, float]:
        """`wait_s` and `company_tokens`; both 0 while the cloud is idle."""
        busy = self._current()
        return {
            "wait_s": round(self._wait_s, 6) if busy else 0.0,
            "company_tokens": round(self._company, 2) if busy else 0.0,
        }

    def _lately(self) -> deque[tuple[float, float, float]]:
        since = self._clock() - IDLE_S
        while self._steps and self._steps[0][0] < since:
            self._steps.popleft()
        return self._steps

    def _current(self) -> bool:
        return self._last is not None and self._clock() - self._last <= IDLE_S


def _slow(values: Iterable[float]) -> float:
    """The percentile SLOW; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(SLOW * len(ordered)))] if ordered else 0.0
