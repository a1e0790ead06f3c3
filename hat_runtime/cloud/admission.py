"""Who gets a session: limits of tenants and devices, the cloud's own, and time for those who talk already.

Where there is no place a session that is idle makes room. Otherwise the device is told at once why, and when to come
back; or it waits in a line, where the cloud has one and the device says for how long. The line is short, whoever has
fewer sessions goes first, and it is shared: who has many places in it gives one up for who has none.

A session has its place until it ends, also while it has no stream: a resume needs none, so it cannot be refused in
favour of a newcomer, and cannot exceed a limit.

A tenant that was refused for want of places has a claim to the next one, before tenants that have more.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc

from hat_runtime.cloud.assembly import ProtocolError
from hat_runtime.cloud.load import Load
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.peer import Peer
from hat_runtime.cloud.session import Failed, Session
from hat_runtime.control.claims import Claims
from hat_runtime.control.overload import Stays, Talking, step_s, too_slow_s
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.control.quotas import Quotas, Scope

LOOK_EVERY_S = 0.1
"""Between two looks whether one in the line may enter: sessions become idle, and passes shorter, without a word."""


@dataclass(frozen=True)
class AdmissionConfig:
    """Bounds of admission."""

    max_sessions: int
    kv_tokens: int
    """Tokens that the KV cache holds."""
    page_tokens: int
    idle_after_s: float
    max_waiting: int = 0
    """Opens that may wait for a place; 0: they are refused at once."""
    tbt_target_s: float | None = None
    """Nobody is let in who would make slow Steps of answers take longer; None: no bound."""


@dataclass(eq=False)
class Place:
    """A session's place in the cloud."""

    peer: Peer
    end: Callable[[Failed], None]
    """Ends the session's stream."""
    since: float
    max_tokens: int
    """What the limits of KV pages allow a single session."""
    session: Session | None = None
    """None until it is opened."""
    back: float = 0.0
    """Monotonic seconds of its latest resume."""
    lost: bool = False
    """Its session has no stream, but may get one again."""
    was_idle: bool = False
    """When its stream was lost."""


@dataclass(eq=False)
class _Waiting:
    place: Place
    granted: asyncio.Future[None]
    obstacle: ProtocolError


@dataclass(frozen=True)
class _Obstacle:
    """Why there is no place."""

    reason: str
    text: str
    places: int
    """Those that one could get free of."""
    shared: bool = False
    """Among tenants: a limit of the cloud, not of this tenant or device."""


@dataclass
class Admission:
    """For the event loop's thread."""

    config: AdmissionConfig
    metrics: CloudMetrics
    quotas: Callable[[], Quotas]
    cost: Callable[[], PassCost | None]
    load: Load = field(default_factory=Load)
    """What Steps meet; the server tells it."""
    clock: Callable[[], float] = time.monotonic
    _places: list[Place] = field(default_factory=list)
    _line: list[_Waiting] = field(default_factory=list)
    _stays: Stays = field(default_factory=Stays)
    _claims: Claims = field(default_factory=Claims)
    _timer: asyncio.TimerHandle | None = None

    async def admit(self, peer: Peer, end: Callable[[Failed], None], deadline_s: float) -> Place:
        """Get a place, which `leave` must be called for.

        Args:
            peer: who wants it.
            end: ends the stream, if the session is idle while others want a place.
            deadline_s: how long to wait at most; 0: not at all.

        Raises:
            ProtocolError: RESOURCE_EXHAUSTED: which limit, its value, and when to try again.
        """
        now = self.clock()
        tokens = self.config.kv_tokens // self.config.page_tokens
        pages = self.quotas().max_pages(peer.tenant, peer.device, tokens)
        place = Place(peer, end, now, pages * self.config.page_tokens)
        obstacle = self._enter(place)
        if obstacle is None:
            return place
        refusal = self._refusal(obstacle)
        if obstacle.shared:
            self._claims.refused(peer.tenant, now, refusal.retry_after_s or 0.0)
        wait_s = self._stays.wait_s(obstacle.places, len(self._line)) or 0.0
        if deadline_s <= 0 or obstacle.places < 1 or wait_s > deadline_s or not self._room_in_line(peer):
            raise self._counted(refusal, obstacle.reason)
        waiting = _Waiting(place, asyncio.get_running_loop().create_future(), refusal)
        self._line.append(waiting)
        self._show()
        try:
            async with asyncio.timeout(deadline_s):
                await waiting.granted
        except TimeoutError:
            if place not in self._places:
                raise self._counted(refusal, "deadline") from None
        except BaseException:
            self.leave(place)  # granted in the moment in which the device went away
            raise
        finally:
            if waiting in self._line:
                self._line.remove(waiting)
            self._show()
        return place

    def leave(self, place: Place) -> None:
        """A session has ended; whoever waits may enter."""
        if place not in self._places:
            return
        self._places.remove(place)
        if place.session is not None:
            self._stays.ended(max(0.0, place.session.last_active - place.since))
        self._look()

    def lose(self, place: Place, end: Callable[[Failed], None]) -> None:
        """A session has lost its stream. It keeps its place, so that no newcomer is let in before it is resumed.

        One that was idle goes before all others for whoever needs its place: `end` ends it.
        """
        place.was_idle = self._is_idle(place, self.clock())
        place.lost, place.end = True, end

    def take_back(self, place: Place, peer: Peer, end: Callable[[Failed], None]) -> None:
        """A session goes on with another stream, which `end` ends, of the same peer. It has its place already."""
        place.lost, place.peer, place.end, place.back = False, peer, end, self.clock()

    def close(self, reason: str) -> None:
        """Nobody enters any more: refuse those that wait."""
        for waiting in self._line:
            if not waiting.granted.done():
                waiting.granted.set_exception(ProtocolError(reason, grpc.StatusCode.UNAVAILABLE, 1.0))
        self._line.clear()

    def saw_step(self, rows: int, seconds: float) -> None:
        """A Step of an answer, the only one of its session, was answered, in so many seconds."""
        if self.config.tbt_target_s is not None:
            talking = self._talking()
            self.load.saw_step(rows, seconds, step_s(self.cost(), talking, talking.sessions))

    def _enter(self, place: Place) -> _Obstacle | None:
        """Take a place, if need be that of an idle session; or why not."""
        now, peer = self.clock(), place.peer
        ended: list[Place] = []
        for scope, limits in self.quotas().scopes(peer.tenant, peer.device):
            if limits.sessions is not None:
                mine = [one for one in self._places if _counts(scope, one.peer)]
                if not self._makes_room(mine, limits.sessions, ended, now):
                    kind = "tenant" if scope.device is None else "device"
                    text = f"{scope} has all sessions that its quota sessions={limits.sessions} gives"
                    return _Obstacle(f"{kind}_sessions", text, limits.sessions)
        kept = self._claims.ahead(peer.tenant, self._share, now)
        if (slow := self._too_slow(kept)) is not None:
            return slow
        most = self.config.max_sessions
        if not self._makes_room(self._places, most, ended, now, kept):
            text = f"all {most} sessions are busy"
            if kept:
                text += f" or kept for {kept} other tenants, which have fewer and were refused before"
            return _Obstacle("sessions", text, most, shared=True)
        for one in ended:
            self._places.remove(one)
            one.end(Failed(grpc.StatusCode.ABORTED, "ended while idle, to make room for others"))
        place.since = now
        self._places.append(place)
        self._claims.served(peer.tenant)
        self._show()
        return None

    def _makes_room(
        self, there: list[Place], bound: int, ended: list[Place], now: float, kept: int = 0
    ) -> bool:
        """Whether one more fits where `bound` may be, `kept` of them others, once the idle ones are gone that this adds
        to `ended`."""
        left = [one for one in there if one not in ended]
        idle = [one for one in left if self._is_idle(one, now)]
        free = bound - len(left)
        if free + len(idle) <= kept:
            return False
        ended += sorted(idle, key=_precedence)[: max(0, 1 - free)]
        return True

    def _share(self, tenant: str) -> float:
        """What a tenant would have with one session more, by its weight."""
        held = sum(one.peer.tenant == tenant for one in self._places)
        return (held + 1) / self.quotas().tenant(tenant).weight

    def _talking(self) -> Talking:
        now = self.clock()
        talking = [one for one in self._places if not self._is_idle(one, now)]
        texts = [one.session.committed for one in talking if one.session is not None]
        tokens = sum(texts) / len(texts) if texts else 0.0
        return Talking(len(talking), self.load.rows, tokens)

    def _too_slow(self, kept: int) -> _Obstacle | None:
        target_s = self.config.tbt_target_s
        if target_s is None:
            return None
        talking = replace(self._talking(), slow_step_s=self.load.slow_step_s(), stretch=self.load.stretch())
        slow_s = too_slow_s(self.cost(), talking, target_s, kept)
        if slow_s is None:
            return None
        others = f", {kept} places are kept for tenants that were refused before" if kept else ""
        text = (
            f"{talking.sessions} sessions talk{others}, and with one more slow Steps would take "
            f"{slow_s * 1e3:.0f} ms, beyond the target of {target_s * 1e3:.0f} ms (--tbt-target-ms)"
        )
        return _Obstacle("tbt_target", text, max(1, talking.sessions), shared=True)

    def _refusal(self, obstacle: _Obstacle) -> ProtocolError:
        retry_s = self._stays.retry_s(obstacle.places, len(self._line))
        text = f"{obstacle.text}; try again in {retry_s:.1f} s"
        return ProtocolError(text, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s)

    def _counted(self, refusal: ProtocolError, reason: str) -> ProtocolError:
        self.metrics.refused.labels(reason).inc()
        return refusal

    def _room_in_line(self, peer: Peer) -> bool:
        """Whether one more may wait; the last of the tenant with most in the line may have to make room."""
        if len(self._line) < self.config.max_waiting:
            return True
        waiting = Counter(one.place.peer.tenant for one in self._line)
        if not waiting or max(waiting.values()) <= waiting[peer.tenant] + 1:
            return False
        tenant = max(waiting, key=lambda name: waiting[name])
        last = [one for one in self._line if one.place.peer.tenant == tenant][-1]
        self._line.remove(last)
        if not last.granted.done():
            last.granted.set_exception(self._counted(last.obstacle, "line"))
        return True

    def _look(self) -> None:
        """Let those in who may: whose tenant has the fewest sessions first."""
        held = Counter(one.peer.tenant for one in self._places)

        def share(waiting: _Waiting) -> float:
            tenant = waiting.place.peer.tenant
            return held[tenant] / self.quotas().tenant(tenant).weight

        left = list(self._line)
        while left:
            waiting = min(left, key=share)  # the first of them
            left.remove(waiting)
            if not waiting.granted.done() and self._enter(waiting.place) is None:
                waiting.granted.set_result(None)
                self._line.remove(waiting)
                held[waiting.place.peer.tenant] += 1
        self._show()

    def _show(self) -> None:
        self.metrics.sessions_queued.set(len(self._line))
        self.metrics.show_tenants(one.peer.tenant for one in self._places)
        if self._line and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._alarm)

    def _alarm(self) -> None:
        self._timer = None
        self._look()

    def _is_idle(self, place: Place, now: float) -> bool:
        if place.lost:
            return place.was_idle
        session, limit = place.session, now - self.config.idle_after_s
        return session is not None and not session.queue and max(session.last_active, place.back) <= limit


def _counts(scope: Scope, peer: Peer) -> bool:
    return peer.tenant == scope.tenant and scope.device in (None, peer.device)


def _precedence(place: Place) -> tuple[bool, float]:
    """Of those that are idle: who has no stream goes first, then who is idle longest."""
    return not place.lost, 0.0 if place.session is None else place.session.last_active
