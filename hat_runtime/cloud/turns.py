"""Whose turn it is in a pass: tenants by what they have had, a tenant's sessions by the arrival of their Steps."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator

from hat_runtime.cloud.session import Session
from hat_runtime.control.fair_share import FairShare
from hat_runtime.control.quotas import Limits, Quotas, Scope
from hat_runtime.control.throttle import Throttle


class Turns:
    """For one scheduler: shares between tenants, and the rates of tenants and devices."""

    def __init__(self) -> None:
        self._share = FairShare()
        self._throttle = Throttle()

    def begin(self, sessions: Iterable[Session], quotas: Quotas, now: float) -> list[Session]:
        """A pass is planned.

        Args:
            sessions: those with a Step.
            quotas: in effect.
            now: monotonic seconds.

        Returns:
            Those that may have rows now, as far as the rates of their tenants and devices go.
        """
        ready = [session for session in sessions if self.allowed(session, quotas, now) > 0]
        self._share.begin({session.tenant for session in ready})
        return ready

    def allowed(self, session: Session, quotas: Quotas, now: float) -> float:
        """Rows that a session may have now by its tenant's and its device's rate; none if 0 or less."""
        if not quotas.rated:
            return math.inf
        return min(self._level(scope, limits, now) for scope, limits in _scopes(session, quotas))

    def order(self, sessions: Iterable[Session]) -> Iterator[Session]:
        """The sessions in their turns. Whoever takes one charges it before asking for the next."""
        of_tenants: dict[str, deque[Session]] = defaultdict(deque)
        for session in sorted(sessions, key=_arrived):
            of_tenants[session.tenant].append(session)
        line = [
            (self._share.used(tenant), _arrived(queue[0]), tenant) for tenant, queue in of_tenants.items()
        ]
        heapq.heapify(line)
        while line:
            tenant = heapq.heappop(line)[2]
            queue = of_tenants[tenant]
            yield queue.popleft()
            if queue:
                heapq.heappush(line, (self._share.used(tenant), _arrived(queue[0]), tenant))

    def charge(self, session: Session, rows: int, quotas: Quotas) -> None:
        """A session gets `rows` rows of the pass."""
        self._share.charge(session.tenant, rows, quotas.tenant(session.tenant).weight)
        for scope, _ in _scopes(session, quotas) if quotas.rated else ():
            self._throttle.spend(scope, rows)

    def end(self, left: Iterable[Session]) -> None:
        """The pass is planned.

        Args:
            left: the sessions that wanted more rows and could have used them.
        """
        self._share.end({session.tenant for session in left})

    def _level(self, scope: Scope, limits: Limits, now: float) -> float:
        return self._throttle.level(scope, limits.tokens_per_second, limits.burst, now)


def _arrived(session: Session) -> float:
    return session.queue[0].arrived


def _scopes(session: Session, quotas: Quotas) -> tuple[tuple[Scope, Limits], ...]:
    return quotas.scopes(session.tenant, session.device)
