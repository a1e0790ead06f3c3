"""Sessions whose stream was lost: how long they are kept, and who may take one over.

Their KV pages are the engine's business: it gives them to others first, and bounds their share (session_table.py). Each
keeps its place in the cloud (admission.py), so a resume needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from hat_runtime.cloud.admission import Place
from hat_runtime.cloud.peer import Peer
from hat_runtime.cloud.session import Session

TTL_S = 60.0


@dataclass(frozen=True)
class _Lost:
    place: Place
    timer: asyncio.TimerHandle


class LostSessions:
    """For the event loop's thread. In the order in which their streams were lost.

    As many as have a place (admission.py).
    """

    def __init__(self, free: Callable[[Place], None], *, ttl_s: float) -> None:
        """Keep each session for `ttl_s` seconds at most; `free` frees what one holds."""
        self.ttl_s = ttl_s
        self._free = free
        self._lost: dict[str, _Lost] = {}

    def __len__(self) -> int:
        return len(self._lost)

    def keep(self, place: Place) -> None:
        """The session of a place has lost its stream: keep it for a time."""
        assert place.session is not None
        timer = asyncio.get_running_loop().call_later(self.ttl_s, self._expire, place.session.id)
        self._lost[place.session.id] = _Lost(place, timer)

    def take(self, session_id: str, peer: Peer) -> Place | None:
        """The place of the session of that id, if this peer opened it; it has a stream again."""
        lost = self._lost.get(session_id)
        if lost is None or lost.place.peer != peer:
            return None
        lost.timer.cancel()
        del self._lost[session_id]
        return lost.place

    def end(self, session: Session) -> None:
        """End a session, if it is here."""
        if session.id in self._lost:
            self._expire(session.id)

    def end_where(self, refused: Callable[[Peer], bool]) -> None:
        """End the sessions of some peers."""
        for session_id, lost in list(self._lost.items()):
            if session_id in self._lost and refused(lost.place.peer):
                self._expire(session_id)

    def clear(self) -> None:
        """End all of them."""
        self.end_where(lambda peer: True)

    def _expire(self, session_id: str) -> None:
        lost = self._lost.pop(session_id)
        lost.timer.cancel()
        self._free(lost.place)
