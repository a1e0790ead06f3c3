"""Whose KV pages a session may take when there are too few.

Sessions without a stream lose theirs first, then idle ones, the longest idle before the others. Between active
sessions of one tenant the older one wins. Between tenants: who stays within a fair share of the pages may take them
from a tenant that has more than its own; beyond that only the older session wins, and only over tenants that have
their share. Where this lets nobody get ahead, the longest open session takes everybody's, so that there is always one
that does.

Each session is preempted at most `max_evictions` times, and one that was taken for idle is given twice the time from
then on, so preemption ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hat_runtime.cloud.session import Session
from hat_runtime.control.quotas import Quotas
from hat_runtime.model.pages import KvCache

MOST_PATIENCE = 6
"""A session counts as idle after twice the time whenever it lost its pages by that, so many times."""


@dataclass(frozen=True)
class Need:
    """A session that needs pages, and those that may be asked for them."""

    session: Session
    pages: int
    """To allocate, beyond those that it has."""
    everyone: Sequence[Session]
    """All sessions, the longest open first."""
    in_pass: Collection[int]
    """id() of the sessions that the pass has already: theirs stay."""
    quotas: Quotas
    now: float
    """Monotonic seconds."""
    last_resort: bool = False
    """Nobody got ahead for a while: age alone counts."""


class PageRoom:
    """Finds pages, within the tenants' and devices' shares."""

    def __init__(self, cache: KvCache, idle_after_s: float, max_evictions: int) -> None:
        self._cache = cache
        self._idle_after_s = idle_after_s
        self._max_evictions = max_evictions

    def make(self, need: Need) -> list[Session] | str:
        """Take pages from others until there are enough.

        Returns:
            Who has lost its pages, nobody at all if there are enough; or why there is no room: then nothing changed.
        """
        short = need.pages - self._cache.free_pages
        excess = self._excess(need) if need.pages else []
        if short <= 0 and not excess:
            return []
        victims = self._victims(need)
        chosen: list[Session] = []
        for of_scope, pages, text in excess:
            if not _choose([victim for victim in victims if of_scope(victim)], pages, chosen):
                return text
        if not _choose(victims, short, chosen):
            return f"the KV cache ({self._cache.num_pages} pages) is full; try again later"
        for victim in chosen:
            if victim.lost is not None:
                pass  # what it does once it is resumed is not known
            elif self._is_idle(victim, need.now):
                victim.idle_evictions += 1
            else:
                victim.evictions += 1
            self._cache.release(victim.sequence)
        return chosen

    def _excess(self, need: Need) -> list[tuple[Callable[[Session], bool], int, str]]:
        """What the session's tenant and device would have beyond their limits."""
        found: list[tuple[Callable[[Session], bool], int, str]] = []
        me, total = need.session, self._cache.num_pages
        for scope, limits in need.quotas.scopes(me.tenant, me.device):
            most = limits.pages(total)
            if most is None:
                continue

            def same(other: Session, device: str | None = scope.device) -> bool:
                return other.tenant == me.tenant and device in (None, other.device)

            used = sum(len(other.sequence.pages) for other in need.everyone if same(other))
            if used + need.pages > most:
                text = (
                    f"{scope} has {used} of the {most} KV pages that its kv_share={limits.kv_share:g} gives; "
                    "try again later"
                )
                found.append((same, used + need.pages - most, text))
        return found

    def _victims(self, need: Need) -> list[Session]:
        others = [
            one
            for one in need.everyone
            if one is not need.session and one.sequence.pages and id(one) not in need.in_pass
        ]
        idle = sorted(
            (one for one in others if self._is_idle(one, need.now)),
            key=lambda one: (one.lost is None, one.last_active),
        )
        active = [
            one
            for one in reversed(others)
            if not self._is_idle(one, need.now) and one.evictions < self._max_evictions
        ]
        place = {id(one): index for index, one in enumerate(need.everyone)}
        mine = place[id(need.session)]
        younger = [one for one in active if place[id(one)] > mine]
        if need.last_resort:
            return idle + younger
        shares = _Shares(need, self._cache.num_pages)
        if len(shares.used) < 2:
            return idle + younger
        greedy = shares.greedy if shares.modest else set()
        from_greedy = [one for one in active if one.tenant in greedy]
        rest = [
            one
            for one in younger
            if one.tenant not in greedy and (one.tenant == need.session.tenant or one.tenant in shares.full)
        ]
        return idle + from_greedy + rest

    def _is_idle(self, session: Session, now: float) -> bool:
        if session.lost is not None:
            return True
        # A device over a slow link is away so long between two Steps: it would lose its pages each time.
        patience_s = self._idle_after_s * 2 ** min(session.idle_evictions, MOST_PATIENCE)
        return not session.queue and session.last_active <= now - patience_s


class _Shares:
    """The pages of each tenant that has some or wants some, beside its fair share of all."""

    def __init__(self, need: Need, total: int) -> None:
        me = need.session.tenant
        self.used: dict[str, int] = {me: 0}
        for session in need.everyone:
            if session.sequence.pages or session.queue:
                self.used[session.tenant] = self.used.get(session.tenant, 0) + len(session.sequence.pages)
        weights = {tenant: need.quotas.tenant(tenant).weight for tenant in self.used}
        fair = {tenant: int(total * weight / sum(weights.values())) for tenant, weight in weights.items()}
        self.modest = self.used[me] + need.pages <= fair[me]
        """The session's tenant stays within its share."""
        self.greedy = {one for one, used in self.used.items() if one != me and used > fair[one]}
        self.full = {one for one, used in self.used.items() if used >= fair[one]}


def _choose(victims: Sequence[Session], pages: int, chosen: list[Session]) -> bool:
    """Add to `chosen` until the chosen ones of `victims` have so many pages; False if they have not."""
    pages -= sum(len(one.sequence.pages) for one in chosen if one in victims)
    for victim in victims:
        if pages <= 0:
            break
        if victim not in chosen:
            chosen.append(victim)
            pages -= len(victim.sequence.pages)
    return pages <= 0
