"""Waiting for sessions that are about to return."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.holding import worth_waiting_s


@pytest.mark.parametrize(
    ("queued", "due_s", "expected"),
    [
        (4, [0.010, 0.010, 0.011, 0.011], 0.011),  # half of them are on their devices: bring them together
        (4, [0.020], 0.0),  # four would wait 80 ms in all to spare one 30 ms
        (1, [0.010], 0.010),
        (1, [], 0.0),
        (2, [0.005, 0.500], 0.005),
        (1, [-0.1], 0.0),  # overdue: it may never come
        (1, [0.040, 0.041, 0.042], 0.0),  # longer than the pass that they would wait for
    ],
)
def test_waits_when_more_is_saved_than_lost(queued: int, due_s: list[float], expected: float) -> None:
    assert worth_waiting_s(queued, due_s, pass_s=0.030) == expected


@given(st.integers(1, 64), st.lists(st.floats(-1, 1), max_size=64), st.floats(0.0001, 1))
def test_never_longer_than_a_pass(queued: int, due_s: list[float], pass_s: float) -> None:
    assert 0 <= worth_waiting_s(queued, due_s, pass_s) <= pass_s
