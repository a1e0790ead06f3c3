"""The seam between the generation loop and whatever guesses the next tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.control.drafting import Calibration
from hat_runtime.device.sampling import SamplingParams


@dataclass(frozen=True)
class Proposal:
    """Probabilities with which a drafter proposes: for rejection sampling, which needs them."""

    ids: NDArray[np.int64]
    """Token ids [k], each once."""
    q: NDArray[np.float64]
    """[k], sums to 1."""

    def of(self, token: int) -> float:
        """q(token); 0 for a token that cannot be proposed."""
        found = np.flatnonzero(self.ids == token)
        return float(self.q[found[0]]) if len(found) else 0.0


def certain(token: int) -> Proposal:
    """The proposal of a drafter that has no probabilities: all mass on one token."""
    return Proposal(np.array([token], np.int64), np.ones(1))


@dataclass(frozen=True)
class Draft:
    """One guessed token."""

    token: int
    confidence: float
    """0 to 1, as the drafter sees it."""
    source: str
    """Who guessed."""
    proposal: Proposal | None = None
    """None where the sampler needs no probabilities."""
    others: tuple[int, ...] = ()
    """The next likeliest tokens, the likeliest first."""


class DraftState:
    """What a drafter remembers of one conversation. This one remembers nothing."""

    def note(self, start: int, shallow: torch.Tensor, features: torch.Tensor | None) -> None:
        """Tokens that are certain: the text ends with them.

        Rows that are there already must be the same ones, from when they were drafts: `forget` what is not.

        Args:
            start: position of the first row.
            shallow: shallow states [n, hidden_size].
            features: normed deep states of the positions before, [n, hidden_size]; None where they are not known.
        """

    def note_draft(self, position: int, shallow: torch.Tensor) -> None:
        """The shallow state [1, hidden_size] of a draft at `position`: the text so far ends with it."""

    def forget(self, position: int) -> None:
        """Whatever was said of positions from `position` on is void."""


@dataclass(frozen=True)
class Wish:
    """A request for the token at position len(tokens)."""

    state: DraftState
    tokens: Sequence[int]
    """Everything before it, drafts included."""
    params: SamplingParams
    with_proposal: bool
    """The sampler needs probabilities, and the token is to be drawn from them."""
    others: int = 0
    """How many other candidates are wanted."""


class Drafter(ABC):
    """Guesses tokens. For the worker's thread, but for `open`. `prepare` and `release` may be left out."""

    name: str

    def __init__(self) -> None:
        self.calibration = Calibration()
        """How far its confidence can be trusted; the event loop's thread writes it."""

    @abstractmethod
    def open(self) -> DraftState:
        """The state of a new conversation."""

    @abstractmethod
    def propose(self, wishes: Sequence[Wish]) -> list[Draft | None]:
        """One draft for each wish, None where there is no guess; wishes of several conversations share a pass."""

    def prepare(self, state: DraftState, tokens: Sequence[int]) -> None:  # noqa: B027
        """Do now what the next `propose` would have to do for the text so far: nobody waits at the moment."""

    def release(self, state: DraftState) -> None:  # noqa: B027
        """Forget a conversation."""
