"""What a run of fuzzing came to, and whether the process has grown in its second half."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field

import psutil

MIB = 1 << 20


@dataclass
class Watch:
    """Counts inputs and outcomes. Memory is compared from the middle on: caches fill up in the first half."""

    what: str
    seed: int
    total: int
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    middle: int = 0
    """Bytes of resident memory at the middle."""

    @property
    def under_way(self) -> bool:
        return self.sent < self.total

    def count(self, sent: int, *outcomes: str) -> None:
        """So many inputs ended in these ways."""
        self.sent += sent
        self.outcomes.update(outcomes)
        if self.sent >= self.total // 2 and not self.middle:
            self.middle = resident()

    def end(self) -> None:
        """Print a row of docs/benchmarks/fuzz.md, and see that nothing has grown."""
        now = resident()
        ends = ", ".join(f"{name} {count:,}" for name, count in sorted(self.outcomes.items()))
        print(
            f"\n| {self.what} | {self.seed} | {self.sent:,} | {ends} | "
            f"{self.middle / MIB:.0f} | {now / MIB:.0f} |"
        )
        assert now <= 1.05 * self.middle + 8 * MIB, f"grown from {self.middle} to {now} bytes"


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)
