"""The engine's sessions and their KV pages: with a stream, and for a time without one."""

from __future__ import annotations

from collections.abc import Callable

from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.session import Event, Session
from hat_runtime.model.pages import KvCache


class SessionTable(dict[str, Session]):
    """By id, in the order of opening. For the engine's thread."""

    def __init__(self, cache: KvCache, metrics: CloudMetrics, lost_share: float) -> None:
        """Let sessions without a stream keep at most `lost_share` of the pages, 0 to 1."""
        super().__init__()
        self._cache = cache
        self._metrics = metrics
        self._most_lost = lost_share * cache.num_pages

    def open(self, session: Session, now: float) -> None:
        """Admit a session; `now` in monotonic seconds."""
        session.last_active = now
        self[session.id] = session
        self._count()

    def close(self, session: Session) -> None:
        """Forget a session, whatever it waits for, and free its pages."""
        if self.pop(session.id, None) is not None:
            session.queue.clear()
            self._cache.release(session.sequence)
            self._count()

    def lose(self, session: Session, now: float) -> None:
        """A session's stream is gone. Together those without one keep their share; the first lost give theirs up."""
        if session.id not in self:
            return
        session.part()
        session.lost, session.deliver = now, _to_nobody
        lost = sorted((one for one in self.values() if one.lost is not None), key=lambda one: one.lost or 0.0)
        kept = sum(len(one.sequence.pages) for one in lost)
        for one in lost:
            if kept <= self._most_lost:
                break
            if one.sequence.pages:
                kept -= len(one.sequence.pages)
                self._cache.release(one.sequence)
                self._metrics.evictions.inc()
        self._count()

    def take_over(self, session: Session, deliver: Callable[[Event], None], now: float) -> bool:
        """Give a session to another stream, which gets all events from now on; False if there is no such session."""
        if session.id not in self:
            return False
        session.part()
        session.lost, session.deliver, session.last_active = None, deliver, now
        self._count()
        return True

    def check(self) -> None:
        """Raise RuntimeError unless free + owned == total."""
        self._cache.check(session.sequence for session in self.values())

    def _count(self) -> None:
        lost = sum(session.lost is not None for session in self.values())
        self._metrics.sessions_open.set(len(self) - lost)
        self._metrics.sessions_lost.set(lost)
        self.count_pages()

    def count_pages(self) -> None:
        """Export how many pages are in use."""
        self._metrics.kv_usage.set(1 - self._cache.free_pages / self._cache.num_pages)


def _to_nobody(event: Event) -> None:
    """For a session without a stream."""
