"""What a device has guessed of a text and not seen confirmed: the chain of drafts behind the certain tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hat_runtime.device.drafting.base import Draft, DraftState
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.verify import COUPLED
from hat_runtime.model.pages import PagedSequence


@dataclass(frozen=True)
class Alternative:
    """Another choice for a draft's position, checked with it; nothing is drafted behind it."""

    token: int
    hidden: torch.Tensor
    """Shallow state [1, hidden_size]."""


@dataclass(frozen=True)
class Checked:
    """What the cloud says of a round."""

    deep: torch.Tensor
    """Deep states [n + alternatives, hidden_size]: of the last certain token and of the drafts behind it."""
    alternatives: tuple[tuple[int, int], ...] = ()
    """(position, token) of the last rows."""


@dataclass(eq=False)
class Speculation:
    """The drafts of one answer. The worker's thread changes it while it runs a job of the answer, and nobody else."""

    sequence: PagedSequence
    """The device's KV cache of the text, drafts included."""
    state: DraftState
    """What the drafter remembers of the text."""
    params: SamplingParams
    sampler: str = COUPLED
    stop_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    """The certain tokens, the prompt's included."""
    end_at: int = sys.maxsize
    """Tokens of the text when it is complete, the prompt's included."""
    cached: int = 0
    """Leading certain tokens whose keys and values the device's cache holds."""
    drafts: list[Draft] = field(default_factory=list)
    """What may follow the certain tokens."""
    hidden: list[torch.Tensor] = field(default_factory=list)
    """Shallow states: of the last certain token, once it is known, then of each draft, [1, hidden_size] each. Where an
    alternative was right, the first has two rows: neither it nor the token behind it is in the cloud's cache."""
    alternatives: dict[int, list[Alternative]] = field(default_factory=dict)
    """Other choices for drafts that were run through the input layers, by position."""
    held: list[int] = field(default_factory=list)
    """Tokens behind the certain ones whose keys and values the device's cache holds."""
    fresh: torch.Tensor | None = None
    """Normed deep states [k, hidden_size] before the last k certain tokens, while these have no shallow states yet."""
    point: int = 0
    """Index of the draft that `branches` are other choices for."""
    branches: dict[int, list[Draft]] = field(default_factory=dict)
    """Tokens that may stand there instead, each with what may follow it."""
    noted: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """What became certain since the chain began, for the drafter: (position, shallow, features)."""

    @property
    def end(self) -> int:
        """Position after the last draft."""
        return len(self.tokens) + len(self.drafts)

    @property
    def text(self) -> list[int]:
        """Certain tokens and drafts."""
        return self.tokens + [draft.token for draft in self.drafts]

    def confirm(self, accepted: int, normed: torch.Tensor) -> None:
        """The first `accepted` drafts are certain; `normed` [n, hidden_size] are the deep states that say so."""
        if accepted:
            shallow = torch.cat(self.hidden[1 : accepted + 1])
            self.noted.append((len(self.tokens), shallow, normed[:accepted]))
        new = [draft.token for draft in self.drafts[:accepted]]
        same = common_prefix(new, self.held)
        self.held = self.held[accepted:] if same == accepted else []
        self.cached += same
        self.tokens += new
        del self.drafts[:accepted], self.hidden[:accepted]
        self.point -= accepted
        if self.point < 0:  # the draft that they are other choices for is certain
            self.aim(0)

    def aim(self, point: int) -> None:
        """Branches are for the draft `point` from now on; those for another one would be guesses out of place."""
        if point != self.point:
            self.branches.clear()
        self.point = point

    def restart(self) -> None:
        """Nothing behind the certain tokens holds any more."""
        self.drafts.clear()
        self.hidden.clear()
        self.held.clear()
        self.alternatives.clear()
        self.branches.clear()
        self.point = 0

    def tell_drafter(self) -> None:
        """Hand over what became certain."""
        for position, shallow, features in self.noted:
            self.state.note(position, shallow, features)
        self.noted.clear()


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


@dataclass(frozen=True)
class DraftPlan:
    """How far a job may draft."""

    enough: Callable[[Sequence[Draft]], bool]
    """Whether to stop after these drafts, all of the chain's or of a branch's."""
    others: int = 0
    """How many other candidates for the next token to remember."""
    alternatives: Callable[[Sequence[Draft]], int] = lambda drafts: 0
    """How many of the others of the last of these drafts are to be checked with it."""


NO_DRAFTS = DraftPlan(lambda drafts: True)
