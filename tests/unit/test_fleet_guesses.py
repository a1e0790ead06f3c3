"""Drafts of the simulator: as often right as was measured."""

from __future__ import annotations

import random

import pytest

from tests import benchmark_modules  # noqa: F401

from fleet.guesses import RIGHT, DrawnGuesses, RecordedGuesses, Round, mean_acceptance  # isort: skip


@pytest.mark.parametrize("tokens", [1.3, 2.06, 3.58])
def test_drafts_give_the_tokens_a_round_that_were_asked_for(tokens: float) -> None:
    """By the rule of the paper: a draft of confidence below 0.6 is the last, and 6 are the most."""
    guesses, rounds, seen = DrawnGuesses(mean_acceptance(tokens), random.Random(1)), 20_000, 0
    for _ in range(rounds):
        right = True
        for index in range(6):
            draft = guesses.next(index)
            right = right and draft.token == RIGHT
            seen += right
            if draft.confidence < 0.6:
                break
    assert 1 + seen / rounds == pytest.approx(tokens, rel=0.03)


def test_confidence_is_how_often_a_draft_is_right() -> None:
    guesses = DrawnGuesses(0.55, random.Random(2))
    drafts = [guesses.next(0) for _ in range(20_000)]
    for low in (0.0, 0.25, 0.5, 0.75):
        some = [draft for draft in drafts if low <= draft.confidence < low + 0.25]
        mean = sum(draft.confidence for draft in some) / len(some)
        assert sum(draft.token == RIGHT for draft in some) / len(some) == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize("tokens", [1.0, 7.0])
def test_what_no_drafter_gives(tokens: float) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens a round"):
        mean_acceptance(tokens)


def test_recorded_rounds_come_again() -> None:
    guesses = RecordedGuesses([Round(4, 3), Round(2, 2)])
    assert guesses.scripted_drafts == 3
    assert [guesses.next(index).token == RIGHT for index in range(3)] == [True, True, False]
    guesses.round_over()
    assert guesses.scripted_drafts == 1
    assert guesses.next(0).token == RIGHT
    guesses.round_over()
    assert guesses.scripted_drafts == 0
