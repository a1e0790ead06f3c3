"""What a turn makes of deep states: certain tokens, and what the drafter is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hat_runtime.device.chain import DraftPlan, Speculation
from hat_runtime.device.drafting.base import Draft, DraftState
from hat_runtime.device.jobs import ShallowJob, Turn, TurnJob
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.model.pages import PagedSequence

PLAN = DraftPlan(lambda drafts: len(drafts) >= 3)


class Recorder(DraftState):
    """Says what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def note(self, start: int, shallow: torch.Tensor, features: torch.Tensor | None) -> None:
        self.told.append(("note", start, len(shallow)))

    def note_draft(self, position: int, shallow: torch.Tensor) -> None:
        self.told.append(("draft", position))

    def forget(self, position: int) -> None:
        self.told.append(("forget", position))


def drafted(*tokens: int) -> tuple[Speculation, Recorder]:
    """Certain tokens 1 2 3 and drafts, all of them in the device's cache."""
    state = Recorder()
    spec = Speculation(PagedSequence(), state, SamplingParams(), tokens=[1, 2, 3], cached=3, end_at=100)
    spec.drafts = [Draft(token, 0.9, "test") for token in tokens]
    spec.hidden = [torch.zeros(1, 2) for _ in (3, *tokens)]
    spec.held = list(tokens)
    return spec, state


def judged(spec: Speculation, target: Sequence[int], plan: DraftPlan = PLAN, most: int = 50) -> TurnJob:
    """A job whose deep states say these tokens."""
    future: asyncio.Future[Turn] = asyncio.Future(loop=asyncio.new_event_loop())
    job = TurnJob(spec, future, torch.zeros(len(target), 2), plan, most=most)
    job.judge(torch.nn.functional.one_hot(torch.tensor(target), 10).float(), torch.zeros(len(target), 2))
    return job


def test_a_refused_draft_is_forgotten_before_the_drafter_hears_of_what_replaces_it() -> None:
    spec, state = drafted(4, 5, 6)
    job = judged(spec, [4, 9, 0])
    assert (spec.tokens, job.start, job.ids) == ([1, 2, 3, 4, 9], 4, [9])
    job.embedded(torch.zeros(1, 2))
    assert state.told == [("forget", 4), ("note", 3, 1), ("note", 4, 1)]
    turn = job.result()
    assert (turn.tokens, turn.refused, turn.fresh, turn.dropped) == ([4, 9], True, True, 2)
    assert [right for _, right in turn.judged] == [True, False]


def test_accepted_drafts_are_not_computed_again() -> None:
    spec, state = drafted(4, 5, 6)
    job = judged(spec, [4, 5])
    assert (spec.tokens, spec.cached, spec.text) == ([1, 2, 3, 4, 5], 5, [1, 2, 3, 4, 5, 6])
    assert (job.ids, job.wants_draft, state.told) == ([], True, [])
    turn = job.result()
    assert (turn.tokens, turn.fresh, turn.dropped) == ([4, 5], False, 0)


def test_a_branch_goes_on_where_its_token_replaces_the_draft() -> None:
    spec, _ = drafted(4, 5, 6)
    spec.aim(1)
    spec.branches[9] = [Draft(8, 0.5, "test")]
    job = judged(spec, [4, 9])
    assert (spec.text, job.ids, job.result().hit) == ([1, 2, 3, 4, 9, 8], [9, 8], True)


def test_a_branch_elsewhere_is_none() -> None:
    spec, _ = drafted(4, 5, 6)
    spec.aim(2)
    spec.branches[9] = [Draft(8, 0.5, "test")]
    assert not judged(spec, [4, 9]).result().hit
    assert (spec.text, spec.branches) == ([1, 2, 3, 4, 9], {})


@pytest.mark.parametrize(("most", "says"), [(1, [4]), (2, [4, 5]), (2, [4, 9])])
def test_nothing_is_drafted_behind_the_last_token(most: int, says: list[int]) -> None:
    spec, _ = drafted(4, 5, 6)
    job = judged(spec, [*says, 6][:3], most=most)
    assert (job.ids, job.wants_draft, spec.drafts) == ([], False, [])
    turn = job.result()
    assert turn.tokens == says
    assert sum(right for _, right in turn.judged) + turn.dropped == 3  # every draft is counted once


def test_drafts_end_where_the_text_must() -> None:
    """The round that has them judges one token more: what lay beyond would not be read, and may not fit."""
    spec, _ = drafted()
    spec.end_at = 6
    job = judged(spec, [4])
    job.embedded(torch.zeros(1, 2))
    assert job.wants_draft
    assert job.drafted(Draft(5, 0.9, "test"))
    job.embedded(torch.zeros(1, 2))
    assert not job.wants_draft
    assert spec.text == [1, 2, 3, 4, 5]


def test_an_upload_forgets_an_earlier_text() -> None:
    state = Recorder()
    future: asyncio.Future[torch.Tensor] = asyncio.Future(loop=asyncio.new_event_loop())
    ShallowJob(PagedSequence(), future, [5, 6], 7, state).embedded(torch.zeros(2, 2))
    assert state.told == [("forget", 7), ("note", 7, 2)]
