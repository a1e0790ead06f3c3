"""A link, one way: first come, first served, at a rate, then half a round trip; and streams that share it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fleet.events import Events
from hat_runtime.wire.frames import MAX_FRAME_BYTES


class Direction:
    """Messages one after the other, as on the emulated link: departure = max(now, next free) + bytes / rate."""

    def __init__(self, events: Events, bytes_per_s: float, delay_s: float) -> None:
        """Make an idle one.

        Args:
            events: the clock.
            bytes_per_s: rate, above 0.
            delay_s: from the last byte's departure to its arrival.
        """
        if bytes_per_s <= 0 or delay_s < 0:
            raise ValueError(f"a link of {bytes_per_s} bytes/s with a delay of {delay_s} s")
        self._events = events
        self._rate = bytes_per_s
        self._delay_s = delay_s
        self._free_s = 0.0
        self.bytes = 0.0
        """Carried so far, or taken on."""

    def send(self, size: float) -> tuple[float, float]:
        """Take on `size` bytes now; (when the last of them has left, when it arrives)."""
        self._free_s = max(self._events.now, self._free_s) + size / self._rate
        self.bytes += size
        return self._free_s, self._free_s + self._delay_s


class Stream:
    """One session's messages on a direction, in order. Sessions take turns by frames, as on a gRPC channel."""

    def __init__(self, events: Events, direction: Direction) -> None:
        self._events = events
        self._direction = direction
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._sending = False

    def send(self, size: float, arrived: Callable[[], None]) -> None:
        """Queue a message of `size` bytes; `arrived` is called when all of it is at the far end."""
        self._waiting.append((size, arrived))
        if not self._sending:
            self._next()

    def drop_unsent(self) -> int:
        """Forget the messages that have not begun to leave; how many they were."""
        dropped = max(0, len(self._waiting) - self._sending)
        for _ in range(dropped):
            self._waiting.pop()
        return dropped

    def _next(self) -> None:
        size, arrived = self._waiting[0]
        frame = min(size, MAX_FRAME_BYTES)
        left_s, arrival_s = self._direction.send(frame)
        if frame < size:
            self._waiting[0] = (size - frame, arrived)
        else:
            self._events.at(arrival_s, arrived)
        self._sending = True
        self._events.at(left_s, self._left, frame == size)

    def _left(self, whole: bool) -> None:
        if whole:
            self._waiting.popleft()
        self._sending = False
        if self._waiting:
            self._next()
