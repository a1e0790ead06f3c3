"""Whether there is time for one more session, and when there may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.overload import LEAST_RETRY_S, MOST_RETRY_S, Stays, Talking, step_s, too_slow_s
from hat_runtime.control.pass_cost import PassCost

COST = PassCost(0.02, 0.002, 1e-6, 1e-6)


def test_a_step_is_a_pass_with_everybody_in_it() -> None:
    talking = Talking(3, rows=4, tokens=1000)
    assert step_s(COST, talking, 3) == pytest.approx(0.02 + 3 * (0.001 + 4 * (0.002 + 0.001)))
    assert step_s(COST, talking, 0) == 0.02
    assert step_s(None, talking, 3) == 0


@given(
    st.integers(0, 100),
    st.floats(1, 20),
    st.floats(0, 4000),
    st.floats(0.5, 10),
    st.floats(0.001, 1),
    st.integers(0, 3),
)
def test_whom_the_target_lets_in_meets_it(
    sessions: int, rows: float, tokens: float, stretch: float, target_s: float, kept: int
) -> None:
    talking = Talking(sessions, rows, tokens, stretch=stretch)
    slow_s = too_slow_s(COST, talking, target_s, kept)
    if slow_s is not None:
        assert slow_s > target_s
        # Whoever leaves makes it better, whatever is not in the model.
        assert too_slow_s(COST, Talking(0, rows, tokens, stretch=stretch), target_s) is None
    elif sessions + kept:
        assert step_s(COST, talking, sessions + kept + 1) * stretch <= target_s or stretch < 1
        assert step_s(COST, talking, sessions + kept + 1) <= target_s


def test_slow_steps_count_as_they_would_be_with_one_session_more() -> None:
    talking = Talking(1, rows=1, tokens=0, stretch=2.0)
    assert too_slow_s(COST, talking, 0.048) is None  # 2 (20 + 2 * 2) ms
    assert too_slow_s(COST, talking, 0.047) == pytest.approx(0.048)
    assert too_slow_s(COST, talking, 0.051, kept=1) == pytest.approx(0.052)


def test_what_was_seen_counts_where_there_is_no_model() -> None:
    assert too_slow_s(None, Talking(2, 1, 10, 0.2), 0.1) == 0.2
    assert too_slow_s(None, Talking(2, 1, 10), 0.1) is None


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
