"""Which drafts the target accepts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hat_runtime.device.drafting.base import Draft, Proposal, certain
from hat_runtime.device.drafting.choose import choose
from hat_runtime.device.sampling import SamplingParams, sample
from hat_runtime.device.verify import COUPLED, REJECTION, SAMPLERS, Verdict, distribution, judge, residual

VOCABULARY, STOP = 8, 7


def drafts(*tokens: int, proposals: bool = False) -> list[Draft]:
    return [Draft(token, 0.5, "test", certain(token) if proposals else None) for token in tokens]


def says(*tokens: int) -> torch.Tensor:
    """Logits of a target that is all but certain of these tokens."""
    return 200.0 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).float()


TABLE = [
    # target, drafts, most, tokens, accepted, refused
    ("no drafts", [3], [], 9, [3], 0, False),
    ("full match and the token behind", [1, 2, 3], [1, 2], 9, [1, 2, 3], 2, False),
    ("the token behind was drafted, too", [1, 2, 3], [1, 2, 3, 4], 9, [1, 2, 3], 3, False),
    ("the token behind was drafted wrongly", [1, 2, 3], [1, 2, 4, 5], 9, [1, 2, 3], 2, True),
    ("mismatch at once", [1, 2, 3], [5, 2], 9, [1], 0, True),
    ("mismatch later", [1, 2, 3], [1, 5], 9, [1, 2], 1, True),
    ("stop token drafted", [1, STOP, 3], [1, STOP, 3], 9, [1, STOP], 2, False),
    ("stop token instead of a draft", [1, STOP, 3], [1, 2, 3], 9, [1, STOP], 1, True),
    ("stop token behind the drafts", [1, STOP], [1], 9, [1, STOP], 1, False),
    ("stop token drafted and refused", [1, 2, 3], [STOP, 2], 9, [1], 0, True),
    ("no room for more", [1, 2, 3], [1, 2, 3], 2, [1, 2], 2, False),
    ("room for one", [1, 2, 3], [1, 2], 1, [1], 1, False),
    ("room ends with a refusal", [1, 2, 3], [1, 5], 2, [1, 2], 1, True),
]


@pytest.mark.parametrize(
    ("target", "guess", "most", "tokens", "accepted", "refused"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_table(
    target: list[int],
    guess: list[int],
    most: int,
    tokens: list[int],
    accepted: int,
    refused: bool,
    sampler: str,
    temperature: float,
) -> None:
    """The same for every sampler where the target is certain."""
    found = judge(
        says(*target),
        drafts(*guess, proposals=sampler == REJECTION),
        SamplingParams(temperature, seed=3),
        20,
        sampler=sampler,
        stop_ids=frozenset({STOP}),
        most=most,
    )
    assert found == Verdict(tokens, accepted, refused)


@given(st.integers(0, 10**6), st.lists(st.integers(0, VOCABULARY - 1), max_size=5), st.integers(1, 6))
def test_coupled_text_is_that_of_plain_sampling(seed: int, guess: list[int], most: int) -> None:
    logits = torch.randn(len(guess) + 1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(1.0, 0.9, seed)
    found = judge(logits, drafts(*guess), params, 7, sampler=COUPLED, stop_ids=frozenset({STOP}), most=most)
    assert found.tokens == [sample(logits[row], params, 7 + row) for row in range(len(found.tokens))]
    assert found.tokens[: found.accepted] == guess[: found.accepted]
    assert found.refused == (found.accepted < min(len(guess), len(found.tokens)))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_frequencies_with_rejection(top_p: float) -> None:
    """A draft from another distribution, accepted or replaced, and the token behind it: chi-square of the pair."""
    generator = torch.Generator().manual_seed(4)
    target, guess = (
        torch.randn(2, VOCABULARY, generator=generator),
        torch.randn(VOCABULARY, generator=generator),
    )
    ids, count = np.arange(VOCABULARY), 12_000
    seen, accepted = np.zeros((VOCABULARY, VOCABULARY)), 0
    for seed in range(count):
        params = SamplingParams(1.0, top_p, seed)
        draft = choose(guess, ids, params, 5, "test", with_proposal=True)
        logits = torch.stack([target[0], target[1]])
        found = judge(logits, [draft], params, 5, sampler=REJECTION, stop_ids=frozenset(), most=9)
        accepted += found.accepted
        if found.accepted:
            seen[found.tokens[0], found.tokens[1]] += 1
        else:  # the loop would ask again
            behind = judge(logits[1:], [], params, 6, sampler=REJECTION, stop_ids=frozenset(), most=9)
            seen[found.tokens[0], behind.tokens[0]] += 1
    p = np.zeros((2, VOCABULARY))
    for row in range(2):
        kept, odds = distribution(target[row], SamplingParams(1.0, top_p))
        p[row, kept] = odds
    expected = np.outer(p[0], p[1]) * count
    assert seen[expected == 0].sum() == 0
    cells = expected > 0
    statistic = ((seen[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    freedom = cells.sum() - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    overlap = np.minimum(p[0], _shaped(guess, top_p)).sum()
    assert accepted / count == pytest.approx(
        overlap, abs=0.02
    )  # as many as can be (Leviathan et al., theorem 3.5)


def _shaped(logits: torch.Tensor, top_p: float) -> NDArray[np.float64]:
    full = np.zeros(VOCABULARY)
    kept, odds = distribution(logits, SamplingParams(1.0, top_p))
    full[kept] = odds
    return full


class TestResidual:
    def test_what_p_has_more_of(self) -> None:
        proposal = Proposal(np.array([4, 1]), np.array([0.75, 0.25]))
        left = residual(np.array([0, 1, 4]), np.array([0.25, 0.5, 0.25]), proposal)
        assert left.tolist() == [0.25, 0.25, 0.0]

    def test_nothing_is_left_where_both_are_equal(self) -> None:
        ids, p = np.array([2, 3]), np.array([0.5, 0.5])
        assert residual(ids, p, Proposal(ids, p)).tolist() == p.tolist()

    def test_a_refused_draft_is_never_drawn_again(self) -> None:
        for seed in range(300):
            logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
            guess = drafts(int(logits.argmax()), proposals=True)
            found = judge(
                logits,
                guess,
                SamplingParams(1.0, seed=seed),
                0,
                sampler=REJECTION,
                stop_ids=frozenset(),
                most=2,
            )
            assert found.refused == (found.tokens[0] != guess[0].token)


def test_a_draft_that_the_target_cannot_say_is_refused() -> None:
    """top_p leaves the target one token."""
    found = judge(
        says(2),
        drafts(5, proposals=True),
        SamplingParams(1.0, 0.5),
        0,
        sampler=REJECTION,
        stop_ids=frozenset(),
        most=5,
    )
    assert found == Verdict([2], 0, True)
