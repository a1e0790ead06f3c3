"""Sessions whose stream was lost: how long they are kept, and who may take one over.

Their KV pages are the engine's business: it gives them to others first, and bounds their share (engine.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from hat_runtime.cloud.peer import Peer
from hat_runtime.cloud.session import Session

TTL_S = 60.0


@dataclass(frozen=True)
class _Lost:
    session: Session
    peer: Peer
    timer: asyncio.TimerHandle


class LostSessions:
    """For the event loop's thread. In the order in which their streams were lost."""

    def __init__(self, close: Callable[[Session], None], *, ttl_s: float, most: int) -> None:
        """Keep at most `most` sessions, each for `ttl_s` seconds at most; `close` frees what one holds."""
        self.ttl_s = ttl_s
        self._close = close
        self._most = most
        self._lost: dict[str, _Lost] = {}

    def __len__(self) -> int:
        return len(self._lost)

    def keep(self, session: Session, peer: Peer) -> None:
        """A session has lost its stream: keep it for a time; beyond the bound the first that was lost ends."""
        timer = asyncio.get_running_loop().call_later(self.ttl_s, self._expire, session.id)
        self._lost[session.id] = _Lost(session, peer, timer)
        if len(self._lost) > self._most:
            self._expire(next(iter(self._lost)))

    def of(self, session_id: str, peer: Peer) -> Session | None:
        """The session of that id, if this peer opened it; it stays here."""
        lost = self._lost.get(session_id)
        return lost.session if lost is not None and lost.peer == peer else None

    def release(self, session: Session) -> None:
        """A session has a stream again."""
        self._lost.pop(session.id).timer.cancel()

    def clear(self) -> None:
        """End all of them."""
        for session_id in list(self._lost):
            self._expire(session_id)

    def _expire(self, session_id: str) -> None:
        lost = self._lost.pop(session_id)
        lost.timer.cancel()
        self._close(lost.session)
