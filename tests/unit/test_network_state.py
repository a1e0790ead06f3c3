"""A trained drafter's memory: whatever was drafted and refused, it guesses as if it had seen the certain text alone."""

from __future__ import annotations

import random

import pytest
import torch

from hat_runtime.device.drafting.network import NetworkDrafter, NetworkState, _Layer
from hat_runtime.model.attention import make_backend
from hat_runtime.model.drafter import DrafterNet, DrafterShape
from hat_runtime.model.pages import KvCache
from hat_runtime.model.runner import LayerRunner

HIDDEN, TOKENS = 32, 40
SHALLOW = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
DEEP = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
WRONG = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))


class Bare(NetworkDrafter):
    """The drafter's network and cache, without a file and a head."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self._net = DrafterNet(DrafterShape(kind, HIDDEN, 2, 1, 16, 64, 10_000.0, 1e-6)).requires_grad_(False)
        if kind == "feature":
            torch.nn.init.normal_(self._net.mask)
        cpu = torch.device("cpu")
        self._cache = KvCache(
            layers=1, kv_heads=1, head_dim=16, num_pages=64, page_tokens=4, dtype=torch.float32, device=cpu
        )
        self._runner = LayerRunner(_Layer(self._net, cpu), self._cache, make_backend("sdpa"))

    def guess(self, state: NetworkState) -> torch.Tensor:
        """What it says of the token behind the last row."""
        self._run([state])
        assert state.guess is not None
        return state.guess

    def plain(self, count: int, prompt: int) -> torch.Tensor:
        """The guess of a fresh state behind `count` certain tokens, the first `prompt` of them a prompt."""
        state = self.open()
        state.note(0, SHALLOW[:prompt], None)
        if count > prompt:
            state.note(prompt, SHALLOW[prompt:count], DEEP[prompt:count])
        guess = self.guess(state)
        self.release(state)
        return guess


@pytest.fixture(params=["adapter", "feature"])
def drafter(request: pytest.FixtureRequest) -> Bare:
    return Bare(request.param)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, atol=1e-5)


def test_random_histories(drafter: Bare) -> None:
    """Rounds of drafts, some right, some tried as branches and taken back; then what the target says."""
    for seed in range(30):
        rng = random.Random(seed)
        state, prompt = drafter.open(), rng.randint(1, 9)
        state.note(0, SHALLOW[:prompt], None)
        certain = prompt
        while certain < TOKENS - 8:
            if rng.random() < 0.7:
                drafter.guess(state)
            right = rng.randint(0, 4)  # so many drafts are those of the text
            for index in range(rng.randint(right, 5)):
                state.note_draft(
                    certain + index, (SHALLOW if index < right else WRONG)[certain + index, None]
                )
                if rng.random() < 0.8 and state.waiting:
                    drafter.guess(state)
            if rng.random() < 0.3:  # another choice for one of them
                point = certain + rng.randint(0, right)
                state.note_draft(point, WRONG[point, None])
                state.forget(point)
            end = certain + rng.randint(0, right)  # the first of those that the target refuses
            state.forget(end)
            if end > certain:
                state.note(certain, SHALLOW[certain:end], DEEP[certain:end])
            state.note(end, SHALLOW[end, None], DEEP[end, None])  # what it says instead
            certain = end + 1
            assert state.end == certain
            assert close(drafter.guess(state), drafter.plain(certain, prompt))
            assert len(state.guesses) <= 8  # those of the text before are not kept
        drafter.release(state)
    drafter._cache.check([])


def test_another_text_from_some_position_on(drafter: Bare) -> None:
    """The next turn's prompt differs from what was said: nothing of the old text is left."""
    state = drafter.open()
    state.note(0, SHALLOW[:5], None)
    state.note(5, WRONG[5:20], DEEP[5:20])
    drafter.guess(state)
    state.forget(5)
    state.note(5, SHALLOW[5:12], None)
    assert state.end == 12
    assert close(drafter.guess(state), drafter.plain(12, 12))


def test_a_gap_begins_anew(drafter: Bare) -> None:
    """Rows that were never seen: the network reads on behind them, at the right positions."""
    state = drafter.open()
    state.note(0, WRONG[:6], None)
    drafter.guess(state)
    state.note(10, SHALLOW[10:14], DEEP[10:14])
    assert (state.offset, state.end) == (10, 14)
    other = drafter.open()
    other.note(10, SHALLOW[10:14], DEEP[10:14])
    assert close(drafter.guess(state), drafter.guess(other))


def test_drafts_behind_a_gap_are_not_taken(drafter: Bare) -> None:
    state = drafter.open()
    state.note(0, SHALLOW[:4], None)
    drafter.guess(state)
    state.note_draft(6, WRONG[6, None])
    assert state.end == 4


def test_release_gives_every_page_back_and_the_state_can_go_on(drafter: Bare) -> None:
    state = drafter.open()
    state.note(0, SHALLOW[:9], None)
    drafter.guess(state)
    drafter.release(state)
    drafter._cache.check([])
    assert state.guess is None
    state.note(9, SHALLOW[9:12], DEEP[9:12])
    drafter.guess(state)
    drafter.release(state)
    drafter._cache.check([])
