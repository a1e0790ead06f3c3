"""Places that are kept for tenants that were refused: the next ones go to who has the fewest for its weight.

Without them a place goes to whoever asks first once it is free, and most often that is who has the most devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MOST = 64
"""Tenants that can have a claim at a time."""
PATIENCE = 1.5
"""A claim lasts so many times as long as the device was told to stay away, and the margin."""
MARGIN_S = 0.5


@dataclass(frozen=True)
class _Claim:
    since: float
    until: float


class Claims:
    """One of each tenant at most."""

    def __init__(self) -> None:
        self._claims: dict[str, _Claim] = {}

    def refused(self, tenant: str, now: float, retry_s: float) -> None:
        """The tenant was refused for want of places, and told to come back in `retry_s`; times in seconds."""
        self._forget(now)
        old = self._claims.get(tenant)
        if old is not None or len(self._claims) < MOST:
            until = now + PATIENCE * retry_s + MARGIN_S
            self._claims[tenant] = _Claim(now if old is None else old.since, until)

    def served(self, tenant: str) -> None:
        """The tenant got a place."""
        self._claims.pop(tenant, None)

    def ahead(self, tenant: str, share: Callable[[str], float], now: float) -> int:
        """Places that are kept for others.

        Args:
            tenant: who wants one.
            share: what a tenant would have with one place more, by its weight. Who would have less goes first, and
                of two that would have the same, who was refused first.
            now: seconds.
        """
        self._forget(now)
        own = self._claims.get(tenant)
        mine = share(tenant), now if own is None else own.since
        return sum(
            (share(other), claim.since) < mine for other, claim in self._claims.items() if other != tenant
        )

    def _forget(self, now: float) -> None:
        for tenant in [tenant for tenant, claim in self._claims.items() if claim.until < now]:
            del self._claims[tenant]
