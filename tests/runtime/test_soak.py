"""The short form of `make soak`: mixed traffic with random faults in both modes."""

from __future__ import annotations

from pathlib import Path

import tests.benchmark_modules  # noqa: F401 (finds the benchmark's modules)

from soak import soak  # isort: skip
from soaking.traffic import EXACT, WRONG


async def test_soak_seconds(tmp_path: Path) -> None:
    outcome = await soak(8.0, tmp_path, seed=3, looks=2)
    for tally in outcome.tallies.values():
        ends = {ending for _, ending in tally.counts}
        assert EXACT in ends
        assert WRONG not in ends, tally.problems
        assert tally.tokens > 50
    assert outcome.problems() == []
    assert sum(sum(count.values()) for count in outcome.faults.values()) >= 1
