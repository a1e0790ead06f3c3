"""What a Step meets in the cloud: how long it waits, and how many rows of others share its pass."""

from __future__ import annotations

import time
from collections.abc import Callable

PAST = 0.95
"""Weight of the past at each Step: the last twenty or so count, of whatever session."""
IDLE_S = 10.0
"""Without a Step for so long there is no load."""


class Load:
    """Moving averages over the Steps of all sessions."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._wait_s = 0.0
        self._company = 0.0
        self._step_s = 0.0
        self._stepped: float | None = None
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

    def saw_step(self, rows: int, seconds: float) -> None:
        """A Step of an answer, the only one of its session, was answered.

        Args:
            rows: its tokens and alternatives.
            seconds: from its arrival to its answer.
        """
        now = self._clock()
        past = PAST if self._stepped is not None and now - self._stepped <= IDLE_S else 0.0
        self._stepped = now
        self.rows = past * self.rows + (1 - past) * rows
        self._step_s = past * self._step_s + (1 - past) * seconds

    def step_s(self) -> float:
        """What a Step of an answer takes, in seconds; 0 while there are none."""
        busy = self._stepped is not None and self._clock() - self._stepped <= IDLE_S
        return self._step_s if busy else 0.0

    def figures(self) -> dict[str, float]:
        """`wait_s` and `company_tokens`; both 0 while the cloud is idle."""
        busy = self._current()
        return {
            "wait_s": round(self._wait_s, 6) if busy else 0.0,
            "company_tokens": round(self._company, 2) if busy else 0.0,
        }

    def _current(self) -> bool:
        return self._last is not None and self._clock() - self._last <= IDLE_S
