"""The simulator's clock: what happens next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class Events:
    """Actions in the order of their times; those of one moment in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        """Simulated seconds."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Plan an action. Raises ValueError for a time that has passed."""
        if when < self.now:
            raise ValueError(f"{when} s is before now, {self.now} s")
        heappush(self._heap, (when, next(self._order), action, args))

    def run(self, until: float = float("inf")) -> bool:
        """Do what is planned up to `until` seconds; whether something is left to do."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action, args = heappop(heap)
            action(*args)
        return bool(heap)

    def stop(self) -> None:
        """Forget all that is planned."""
        self._heap.clear()
