"""Rates: so much a second, and a burst after a pause (token buckets)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

MOST_KEPT = 1024
"""Buckets from which on those that are full are forgotten: a full bucket is like a new one."""


@dataclass
class _Bucket:
    rate: float
    burst: float
    level: float
    at: float

    def refill(self, rate: float, burst: float, now: float) -> None:
        self.level = min(burst, self.level + self.rate * max(0.0, now - self.at))
        self.rate, self.burst, self.at = rate, burst, max(now, self.at)


class Throttle:
    """A token bucket for each key. What is spent may exceed what is there once, and is waited for afterwards.

    Whatever is asked for, what was spent by time t is at most burst + rate x t and once the last amount.
    """

    def __init__(self) -> None:
        self._buckets: dict[Hashable, _Bucket] = {}

    def level(self, key: Hashable, rate: float | None, burst: float, now: float) -> float:
        """What may be spent now; nothing may while it is 0 or less.

        Args:
            key: whose bucket.
            rate: a second, above 0; None: there is no limit.
            burst: most that is saved up.
            now: seconds; a clock that goes back changes nothing.
        """
        if rate is None:
            self._buckets.pop(key, None)
            return math.inf
        bucket = self._buckets.get(key)
        if bucket is None:
            self._forget(now)
            bucket = self._buckets[key] = _Bucket(rate, burst, burst, now)
        bucket.refill(rate, burst, now)
        return bucket.level

    def spend(self, key: Hashable, amount: float) -> None:
        """Take from a bucket. A key that `level` has not been asked for, or has no limit, is not counted."""
        if (bucket := self._buckets.get(key)) is not None:
            bucket.level -= amount

    def _forget(self, now: float) -> None:
        if len(self._buckets) < MOST_KEPT:
            return
        for bucket in self._buckets.values():
            bucket.refill(bucket.rate, bucket.burst, now)
        self._buckets = {key: one for key, one in self._buckets.items() if one.level < one.burst}

    def __len__(self) -> int:
        """Buckets that are kept."""
        return len(self._buckets)
