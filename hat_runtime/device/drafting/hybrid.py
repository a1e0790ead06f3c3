"""N-gram or trained network, whichever is more likely to be right at this position."""

from __future__ import annotations

from collections.abc import Sequence

from hat_runtime.device.drafting.base import Draft, Drafter, DraftState, Wish
from hat_runtime.device.drafting.ngram import lookup


class HybridDrafter(Drafter):
    """Asks both; each one's confidence counts as much as it was worth lately (Calibration)."""

    name = "hybrid"

    def __init__(self, network: Drafter) -> None:
        super().__init__()
        self._network = network

    def open(self) -> DraftState:
        """See Drafter."""
        return self._network.open()

    def propose(self, wishes: Sequence[Wish]) -> list[Draft | None]:
        """See Drafter."""
        guesses = self._network.propose(wishes)
        return [self._better(guess, wish) for guess, wish in zip(guesses, wishes, strict=True)]

    def prepare(self, state: DraftState, tokens: Sequence[int]) -> None:
        """See Drafter."""
        self._network.prepare(state, tokens)

    def release(self, state: DraftState) -> None:
        """See Drafter."""
        self._network.release(state)

    def _better(self, guess: Draft | None, wish: Wish) -> Draft | None:
        found = lookup(wish.tokens, wish.with_proposal)
        if found is None or guess is None:
            return found or guess
        if self._rate(found) <= self._rate(guess):
            return guess
        others = tuple(token for token in (guess.token, *guess.others) if token != found.token)
        return Draft(found.token, found.confidence, found.source, found.proposal, others[: wish.others])

    def _rate(self, draft: Draft) -> float:
        return self.calibration.rate(draft.source, draft.confidence)
