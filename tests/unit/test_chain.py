"""What a device has guessed of a text: branches never outlive the draft that they are other choices for."""

from __future__ import annotations

import torch

from hat_runtime.device.chain import Speculation
from hat_runtime.device.drafting.base import Draft, DraftState
from hat_runtime.device.policy import DraftConfig, DraftPolicy
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.model.pages import PagedSequence
from tests.lockstep import PatientTimes


def chain(*tokens: int, others: tuple[int, ...] = ()) -> Speculation:
    """Three certain tokens, and drafts."""
    spec = Speculation(PagedSequence(), DraftState(), SamplingParams(), tokens=[1, 2, 3], cached=3)
    spec.drafts = [Draft(token, 0.9, "test", None, others) for token in tokens]
    spec.hidden = [torch.full((1, 2), float(token)) for token in (3, *tokens)]
    spec.held = list(tokens)
    return spec


def test_confirmed_drafts_are_certain() -> None:
    spec = chain(4, 5, 6)
    spec.confirm(2, torch.zeros(3, 2))
    assert (spec.tokens, spec.cached, spec.held, spec.text) == ([1, 2, 3, 4, 5], 5, [6], [1, 2, 3, 4, 5, 6])
    assert [row.tolist() for row in spec.hidden] == [[[5.0, 5.0]], [[6.0, 6.0]]]
    position, shallow, _ = spec.noted[0]
    assert (position, shallow.tolist()) == (3, [[4.0, 4.0], [5.0, 5.0]])


def test_what_the_cache_holds_of_another_branch_is_not_taken_for_the_text() -> None:
    spec = chain(4, 5, 6)
    spec.held = [4, 9, 9]
    spec.confirm(3, torch.zeros(3, 2))
    assert (spec.cached, spec.held) == (4, [])


def test_branches_move_with_their_draft() -> None:
    spec = chain(4, 5, 6, 7)
    spec.aim(2)
    spec.branches[8] = [Draft(9, 0.5, "test")]
    spec.confirm(2, torch.zeros(3, 2))
    assert (spec.point, list(spec.branches)) == (0, [8])


def test_branches_end_when_their_draft_is_certain() -> None:
    """They would be taken for what may follow a later draft."""
    spec = chain(4, 5, 6, 7)
    spec.aim(1)
    spec.branches[8] = [Draft(9, 0.5, "test")]
    spec.confirm(2, torch.zeros(3, 2))
    assert not spec.branches


def test_another_draft_gets_branches_of_its_own() -> None:
    spec = chain(4, 5, 6, others=(8, 7))
    policy = DraftPolicy(DraftConfig(branches=3), available=True, times=PatientTimes())
    for sent in (1, 2):
        for token in (8, 7):
            found = policy.branch(spec, sent, 0.0)
            assert found is not None
            assert found[0] == token
            spec.aim(sent)
            spec.branches[token] = []
        assert policy.branch(spec, sent, 0.0) is None


def test_nothing_is_drafted_ahead_for_one_of_several_answers() -> None:
    policy = DraftPolicy(DraftConfig(), available=True)
    assert [policy.works_ahead(answers) for answers in (1, 2, 4)] == [True, False, False]
    assert DraftPolicy(DraftConfig(adaptive=False), available=True).works_ahead(4)
