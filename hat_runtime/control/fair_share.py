"""Who of several tenants has had the least of what all of them want.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): each tenant's virtual time grows by what it gets, divided
by its weight, and the one with the least goes first. One that returns after a pause starts where the others are: it
can neither save up what it did not use nor is it made to wait for that.
"""

from __future__ import annotations

from collections.abc import Collection


class FairShare:
    """Virtual times of tenants."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._here: frozenset[str] = frozenset()
        self._now = 0.0
        """The least virtual time among those that wanted something when it was asked last."""

    def begin(self, wanting: Collection[str]) -> None:
        """A round begins.

        Args:
            wanting: the tenants that want something in it.
        """
        for tenant in wanting:
            if tenant not in self._here:
                self._used[tenant] = max(self._used.get(tenant, 0.0), self._now)
        self._here = frozenset(wanting)
        if self._here:
            self._now = min(self._used[tenant] for tenant in self._here)
        # Who is away and behind the others would start where they are in any case.
        self._used = {
            name: used for name, used in self._used.items() if name in self._here or used > self._now
        }

    def used(self, tenant: str) -> float:
        """Virtual time of a tenant: the least goes first."""
        return self._used.get(tenant, self._now)

    def charge(self, tenant: str, amount: float, weight: float = 1.0) -> None:
        """A tenant gets `amount`, which counts `amount / weight`."""
        self._used[tenant] = self.used(tenant) + amount / weight

    def __len__(self) -> int:
        """Tenants that something is remembered of."""
        return len(self._used)
