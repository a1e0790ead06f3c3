"""Whether there is time for one more session, and when there may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.overload import LEAST_RETRY_S, MOST_RETRY_S, Stays, Talking, step_s, too_slow_s
from hat_runtime.control.pass_cost import PassCost

COST = PassCost(0.02, 0.002, 1e-6, 1e-6)


def test_a_step_is_a_pass_with_everybody_in_it() -> None:
    talking = Talking(3, rows=4, tokens=1000, step_s=0)
    assert step_s(COST, talking, 3) == pytest.approx(0.02 + 3 * (0.001 + 4 * (0.002 + 0.001)))
    assert step_s(COST, talking, 0) == 0.02
    assert step_s(None, talking, 3) == 0


@given(st.integers(1, 100), st.floats(1, 20), st.floats(0, 4000), st.floats(0, 1), st.floats(0.001, 1))
def test_whom_the_target_lets_in_meets_it(
    sessions: int, rows: float, tokens: float, seen_s: float, target_s: float
) -> None:
    talking = Talking(sessions, rows, tokens, seen_s)
    slow_s = too_slow_s(COST, talking, target_s)
    if slow_s is None:
        assert step_s(COST, talking, sessions + 1) <= target_s
        assert seen_s <= target_s
    else:
        assert slow_s > target_s
        # Whoever leaves makes it better, whatever is not in the model.
        assert too_slow_s(COST, Talking(0, rows, tokens, seen_s), target_s) is None


def test_what_was_seen_counts_where_there_is_no_model() -> None:
    assert too_slow_s(None, Talking(2, 1, 10, 0.2), 0.1) == 0.2
    assert too_slow_s(None, Talking(2, 1, 10, 0.0), 0.1) is None


def test_a_wait_follows_how_long_sessions_talk() -> None:
    stays = Stays()
    assert stays.wait_s(4, 0) is None
    assert stays.retry_s(4, 0) == LEAST_RETRY_S
    stays.ended(20)
    assert stays.wait_s(4, 0) == 5
    assert stays.wait_s(4, 3) == stays.retry_s(4, 3) == 20
    assert stays.retry_s(1, 50) == MOST_RETRY_S
    for _ in range(100):
        stays.ended(2)
    assert stays.wait_s(4, 0) == pytest.approx(0.5, rel=0.01)
    assert stays.retry_s(4, 0) == LEAST_RETRY_S
