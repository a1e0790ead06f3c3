"""Every certain token of a round has one kind, and the kinds are those that are counted."""

from __future__ import annotations

import pytest

from hat_runtime.device.drafting.base import Draft
from hat_runtime.device.jobs import Turn
from hat_runtime.device.kinds import kinds_of

RIGHT, WRONG = (Draft(1, 0.9, "test"), True), (Draft(2, 0.9, "test"), False)


@pytest.mark.parametrize(
    ("turn", "kinds"),
    [
        (Turn([5]), ["plain"]),
        (Turn([1, 1, 5], judged=(RIGHT, RIGHT)), ["accepted", "accepted", "plain"]),
        (Turn([1, 1], judged=(RIGHT, RIGHT)), ["accepted", "accepted"]),
        (Turn([1, 7], refused=True, judged=(RIGHT, WRONG)), ["accepted", "corrected"]),
        (Turn([7, 8], refused=True, alternative=True, judged=(WRONG,)), ["alternative", "plain"]),
    ],
)
def test_the_kinds_of_a_round(turn: Turn, kinds: list[str]) -> None:
    assert kinds_of(turn) == kinds
