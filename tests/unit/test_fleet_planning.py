"""How many pods: the search, and the spread of devices over pods."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import benchmark_modules  # noqa: F401

from fleet.costs import VICUNA_7B  # isort: skip
from fleet.planning import Load, Target, most, pods_needed, split_outcome  # isort: skip
from fleet.ways import U_SHAPE  # isort: skip
from fleet.workload import SPEC_BENCH  # isort: skip

LOAD = Load(VICUNA_7B, replace(SPEC_BENCH, draw=lambda rng: 100), 0.05, 1.0, 4.0)


@pytest.mark.parametrize("limit", [3, 4, 57, 99, 100, 250])
def test_the_largest_number_that_fits(limit: int) -> None:
    assert most(lambda count: count <= limit, 4, 100, 1) == (0 if limit < 4 else min(limit, 100))
    coarse = most(lambda count: count <= limit, 4, 100, 8)
    assert (coarse == 0) if limit < 4 else min(limit, 100) - 8 <= coarse <= limit


def test_pods_are_added_until_the_target_is_met() -> None:
    """One pod for all 60 devices answers slowly; the number at which they wait as long as is asked is found."""
    alone = split_outcome(LOAD, U_SHAPE, 60, 1, 1)
    target = Target(10.0, (alone.answer_tbt.p95 + 0.046) / 2)
    need = pods_needed(LOAD, U_SHAPE, target, 60, 60, 1)
    assert 1 < need.pods <= 20
    assert target.met(need.outcome)
    assert not target.met(split_outcome(LOAD, U_SHAPE, 60, need.pods - 1, 1))


def test_targets_are_not_met_by_what_was_given_up_or_lost() -> None:
    outcome, target = split_outcome(LOAD, U_SHAPE, 10, 1, 1), Target(10.0, 10.0)
    assert target.met(outcome)
    assert not target.met(replace(outcome, overloaded=True))
    assert not target.met(replace(outcome, failed=1))
    assert not target.met(replace(outcome, records=[]))
