"""Token mode: what a Step of token ids carries, what answers it, and what the cloud keeps of a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hat_runtime.model.sampling import SamplingParams, probabilities, sample
from hat_runtime.model.speculation import COUPLED, Weighted

MODE = "picospec"
CODEC = "tokens"
"""DescribeReply.codecs of this mode: a device that knows hidden states only finds nothing in common."""


@dataclass(frozen=True)
class Choosing:
    """How the target's tokens are chosen (runtime.proto, Sampling)."""

    params: SamplingParams = field(default_factory=SamplingParams)
    sampler: str = COUPLED
    ahead: int = 0
    end: int = 0
    stop_ids: frozenset[int] = frozenset()

    @property
    def in_cloud(self) -> bool:
        """The target's token depends on nothing that only the device knows."""
        return self.sampler == COUPLED or self.params.temperature == 0.0


@dataclass(frozen=True)
class Tokens:
    """The token ids of a Step; the last `drafts` of them are drafts."""

    ids: list[int]
    drafts: int = 0
    q: list[float] = field(default_factory=list)
    """Of each draft, where the sampler needs it."""
    choosing: Choosing | None = None
    """Of the request: one object for all its Steps. None where the cloud decodes by itself."""
    redraw: int = 0
    own: bool = False
    """Not from the device: the cloud decodes by itself, and nobody waits for a Result."""

    @property
    def given(self) -> int:
        """Ids before the first draft."""
        return len(self.ids) - self.drafts


@dataclass(frozen=True)
class Verdict:
    """runtime.proto, Verdict."""

    accepted: int
    refused: bool = False
    next: int | None = None
    offered: Weighted | None = None


@dataclass(frozen=True)
class Decoded:
    """Tokens that the cloud decoded by itself."""

    epoch: int
    start_pos: int
    ids: list[int]


class Target:
    """The target's distribution at one position."""

    def __init__(self, logits: torch.Tensor, choosing: Choosing, position: int) -> None:
        """Take logits float32 [vocabulary] for the token at `position`."""
        self.position = position
        self._logits = logits
        self._choosing = choosing

    @cached_property
    def choice(self) -> int:
        """The target's own token."""
        return sample(self._logits, self._choosing.params, self.position)

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """Probabilities [vocabulary], at temperature > 0."""
        return probabilities(self._logits, self._choosing.params)


@dataclass
class TokenState:
    """What the cloud keeps of a session beside its KV cache.

    `known` are the target's own tokens from position `start` on. All but the last are in the KV cache, because the
    cloud decoded them by itself; the last is what comes after the cache's end. Where the device draws the tokens, only
    `tip` is known: the distribution after the cache's end.
    """

    choosing: Choosing | None = None
    start: int = 0
    known: list[int] = field(default_factory=list)
    tip: Target | None = None
    ahead_left: int = 0

    def forget(self) -> None:
        """Nothing is known: the cache was cut or lost."""
        self.known.clear()
        self.tip = None
        self.ahead_left = 0

    def set_tip(self, target: Target) -> None:
        """The cache ends before the target's position."""
        assert self.choosing is not None
        self.known.clear()
        self.start, self.tip = target.position, None
        if self.choosing.in_cloud:
            self.known.append(target.choice)
        else:
            self.tip = target

    def extend(self, target: Target) -> None:
        """The newest known token was run: its row gives one more."""
        assert self.start + len(self.known) == target.position
        self.known.append(target.choice)

    @property
    def end(self) -> int:
        """Where the cache ends when it holds nothing but what was judged or decoded here."""
        return self.tip.position if self.tip is not None else self.start + len(self.known) - 1

    def token_at(self, position: int) -> int | None:
        """The target's token at a position, where it is known."""
        index = position - self.start
        return self.known[index] if 0 <= index < len(self.known) else None
