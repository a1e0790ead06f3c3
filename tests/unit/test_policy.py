"""How many alternatives of a draft are checked along with it."""

from __future__ import annotations

import pytest

from hat_runtime.device.drafting.base import Draft
from hat_runtime.device.jobs import Turn
from hat_runtime.device.policy import MOST_ALTERNATIVES, DraftConfig, DraftPolicy
from hat_runtime.errors import UsageError

UNSURE = Draft(4, 0.3, "x", others=(5, 6, 7))


def policy(alternatives: int | None = None, *, row_s: float = 0.001, token_s: float = 0.1) -> DraftPolicy:
    """Knows what a row costs, and what a token does."""
    found = DraftPolicy(DraftConfig(alternatives=alternatives), available=True)
    for rows in (1, 4, 9, 2, 7) * 4:
        found.saw_pass(rows, rows, 0.03 + row_s * rows)
    for _ in range(30):
        found.times.saw_round(token_s, 1, 0.0)
    return found


def wanted(found: DraftPolicy, *drafts: Draft) -> int:
    return found.plan(alternatives=True).alternatives(drafts)


def test_the_dearer_a_row_the_fewer() -> None:
    counts = [wanted(policy(row_s=row_s), UNSURE) for row_s in (1e-5, 2e-3, 1e-2, 0.1)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (MOST_ALTERNATIVES, 0)


def test_the_link_and_the_others_in_a_pass_count_as_well() -> None:
    found = policy()
    assert found.least_row_worth == pytest.approx(0.01, rel=0.05)
    found.row_link_s = 0.004
    assert found.least_row_worth == pytest.approx(0.05, rel=0.05)
    for _ in range(60):
        found.saw_pass(12, 3, 0.03 + 0.012)
    assert found.least_row_worth == pytest.approx(0.08, rel=0.05)


def test_none_where_the_draft_is_sure_or_its_predecessors_are_not() -> None:
    found = policy(row_s=3e-3)
    assert wanted(found, UNSURE) > 0
    assert wanted(found, Draft(4, 1.0, "x", others=(5, 6, 7))) == 0
    assert wanted(found, *[Draft(3, 0.1, "x")] * 3, UNSURE) == 0


def test_what_is_never_right_is_given_up_and_what_is_right_is_taken() -> None:
    found = policy(row_s=5e-3)
    for _ in range(60):
        found.learn(Turn([7], True, judged=((UNSURE, False),)))
    assert wanted(found, UNSURE) == 0  # the first two never were: the third is not reached
    for _ in range(60):
        found.learn(Turn([5], True, judged=((UNSURE, False),)))
    assert wanted(found, UNSURE) >= 1


def test_a_number_is_a_number() -> None:
    assert wanted(policy(2, row_s=0.1), UNSURE) == 2
    assert policy(0).plan(alternatives=True).others == 0
    assert policy().plan(alternatives=False).others == 0


@pytest.mark.parametrize("count", [-1, 9])
def test_a_wrong_number_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"--alternatives {count}: must be auto or 0 to 8"):
        DraftConfig(alternatives=count)
