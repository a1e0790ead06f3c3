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
        self._left: frozenset[str] = frozenset()
        self._now = 0.0
        """Where those start that wanted nothing more after the latest round."""

    def begin(self, wanting: Collection[str]) -> None:
        """A round begins.

        Args:
            wanting: the tenants that want something in it.
        """
        for tenant in wanting:
            if tenant not in self._left:
                self._used[tenant] = max(self._used.get(tenant, 0.0), self._now)

    def end(self, left: Collection[str]) -> None:
        """The round is over.

        Args:
            left: the tenants that could have had more. The others have all they want: they must not hold back the time
                of a third one that returns, who would be given what they never asked for.
        """
        self._left = frozenset(left)
        if self._left:
            self._now = max(self._now, min(self.used(tenant) for tenant in self._left))
        else:
            self._now = max(self._now, *self._used.values(), self._now)
        # Who is away and not ahead of the others would start where they are in any case.
        self._used = {
            name: used for name, used in self._used.items() if name in self._left or used > self._now
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
