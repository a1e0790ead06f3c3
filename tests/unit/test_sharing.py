"""Prompts take from others no more than they may, and come to an end all the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.pass_cost import PassCost
from hat_runtime.control.sharing import Courtesy, Decoder

costs = st.builds(PassCost, st.floats(1e-4, 0.2), st.floats(1e-6, 2e-3), st.floats(0, 1e-6))
decoders = st.lists(st.builds(Decoder, st.floats(-0.5, 0.5), st.floats(1e-3, 1.0)), min_size=1, max_size=20)
totals = st.integers(1, 8192)
COST = PassCost(0.028, 6e-4, 1e-7)


@given(decoders, costs, totals, st.booleans(), st.floats(0.01, 1), st.floats(0, 0.1))
def test_no_cycle_is_stretched_beyond_what_is_allowed(
    others: list[Decoder], cost: PassCost, cached: int, alone: bool, stretch: float, mixing_s: float
) -> None:
    """Unless by the least rows, without which a prompt would never end."""
    courtesy = Courtesy(stretch)
    rows = courtesy.prompt_rows(others, cost, cached, 512, alone=alone, mixing_s=mixing_s)
    assert courtesy.least_rows <= rows <= 512
    if rows > courtesy.least_rows:
        allowed_s = (stretch / 2 if alone else stretch) * min(one.cycle_s for one in others)
        absent_s = max(0.0, min(one.due_s for one in others))
        over_s = cost.seconds(rows, cached + rows) - (absent_s if alone else cost.fixed_s - mixing_s)
        assert over_s <= allowed_s * (1 + 1e-6) + 1e-9


@given(decoders, costs, totals)
def test_waiting_ends_when_the_next_session_is_due(
    others: list[Decoder], cost: PassCost, cached: int
) -> None:
    wait_s = Courtesy().wait_s(others, cost, cached)
    assert wait_s in (0.0, max(0.0, min(one.due_s for one in others)))


def test_a_pass_fits_into_an_absence_that_is_long_enough() -> None:
    others = [Decoder(0.2, 0.25), Decoder(0.3, 0.25)]
    assert Courtesy().wait_s(others, COST, 1000) == 0
    rows = Courtesy().prompt_rows(others, COST, 1000, 512, alone=True)
    assert rows > 200
    assert COST.seconds(rows, 1000 + rows) < 0.2 + 0.125 * 0.25


def test_a_short_absence_is_waited_for_and_then_ridden_along() -> None:
    others = [Decoder(0.02, 0.09)]
    assert Courtesy().wait_s(others, COST, 1000) == pytest.approx(0.02)
    rows = Courtesy().prompt_rows(others, COST, 1000, 512, alone=False)
    assert rows == 31  # of 22.5 ms, at 0.7 ms each and a little more behind 1,000 tokens
    assert Courtesy().prompt_rows(others, COST, 1000, 512, alone=False, mixing_s=0.01) == 17
    assert Courtesy().prompt_rows(others, COST, 1000, 512, alone=False, mixing_s=0.03) == 8


def test_nobody_else_and_nothing_known_mean_no_bound() -> None:
    assert Courtesy().prompt_rows([], COST, 1000, 512, alone=True) == 512
    assert Courtesy().prompt_rows([Decoder(0, 0.1)], None, 1000, 512, alone=True) == 512
    assert Courtesy().wait_s([], COST, 1000) == Courtesy().wait_s([Decoder(0.1, 0.1)], None, 1000) == 0
