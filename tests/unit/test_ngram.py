"""Prompt lookup."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.device.drafting.base import Draft, DraftState, Wish
from hat_runtime.device.drafting.ngram import CONFIDENCE, LONGEST, SHORTEST_ALONE, NgramDrafter, lookup
from hat_runtime.device.sampling import SamplingParams


def plain(tokens: Sequence[int]) -> tuple[int, int] | None:
    """(token, length of the match) by trying every place and length."""
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST_ALONE - 1, -1):
        tail = list(tokens[-length:])
        for end in range(len(tokens) - 1, length - 1, -1):
            if list(tokens[end - length : end]) == tail:
                return tokens[end], length
    return None


@given(st.lists(st.integers(0, 3), max_size=40))
def test_it_finds_what_a_plain_search_finds(tokens: list[int]) -> None:
    found, want = lookup(tokens, False), plain(tokens)
    if want is None:
        assert found is None
    else:
        assert found == Draft(want[0], CONFIDENCE[want[1]], "ngram")


@pytest.mark.parametrize(
    ("tokens", "token"),
    [
        ([], None),
        ([1], None),
        ([1, 1], None),
        ([1, 2, 3, 2], None),  # one token is no hint
        ([1, 2, 3, 1, 2], 3),
        ([1, 2, 3, 1, 2, 4, 1, 2], 4),  # the latest place
        ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 3),  # the longest match before the latest
        ([5, 5, 5], 5),  # the match overlaps the tail
    ],
)
def test_table(tokens: list[int], token: int | None) -> None:
    found = lookup(tokens, False)
    assert (found and found.token) == token


def test_a_longer_match_is_trusted_more() -> None:
    assert list(CONFIDENCE) == sorted(CONFIDENCE)
    assert len(CONFIDENCE) == LONGEST + 1
    assert CONFIDENCE[-1] < 1


def test_proposals_are_certain_and_only_made_where_they_are_wanted() -> None:
    drafter = NgramDrafter()
    wishes = [
        Wish(DraftState(), [1, 2, 3, 1, 2], SamplingParams(1.0), wanted, others=2) for wanted in (False, True)
    ]
    without, with_one = drafter.propose(wishes)
    assert without is not None
    assert with_one is not None
    assert without.proposal is None
    assert with_one.proposal is not None
    assert (with_one.proposal.of(3), with_one.proposal.of(1)) == (1.0, 0.0)
    assert with_one.others == ()
