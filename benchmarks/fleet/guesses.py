"""Where drafts come from and whether they are right: drawn from measured acceptance, or as they were once recorded."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hat_runtime.device.drafting.base import Draft

RIGHT, WRONG = 1, 0
"""Draft.token: there is no text, only whether the target will agree."""
SOURCE = "simulated"
_SPREAD = 1.5
"""Sum of the parameters of the beta distribution that confidences are drawn from: most drafts are nearly sure or
hopeless, as those of trained drafters are."""


@dataclass(frozen=True)
class Round:
    """What a recorded Step of an answer carried and brought."""

    rows: int
    """The last certain token and the drafts behind it."""
    tokens: int
    """Certain after it: accepted drafts and one more."""


class Guesses(ABC):
    """One answer's drafts."""

    @abstractmethod
    def next(self, index: int) -> Draft:
        """A guess for the token behind `index` drafts that are under way."""

    @property
    @abstractmethod
    def scripted_drafts(self) -> int | None:
        """Drafts of the next round; None: that is for the device to decide."""

    @abstractmethod
    def round_over(self) -> None:
        """The drafts of a round were judged."""


class DrawnGuesses(Guesses):
    """A draft's confidence is drawn, and it is right that often: the drafter knows how good its guesses are."""

    scripted_drafts = None

    def __init__(self, mean: float, rng: random.Random) -> None:
        self._a, self._b = _SPREAD * mean, _SPREAD * (1 - mean)
        self._rng = rng

    def next(self, index: int) -> Draft:
        """See Guesses."""
        confidence = self._rng.betavariate(self._a, self._b)
        return Draft(RIGHT if self._rng.random() < confidence else WRONG, confidence, SOURCE)

    def round_over(self) -> None:
        """See Guesses; a draft knows nothing of those before it."""


class RecordedGuesses(Guesses):
    """The rounds of a recorded answer."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self._rounds = iter(rounds)
        self._now = next(self._rounds, Round(1, 1))

    @property
    def scripted_drafts(self) -> int:
        """See Guesses."""
        return self._now.rows - 1

    def next(self, index: int) -> Draft:
        """See Guesses."""
        return Draft(RIGHT if index < self._now.tokens - 1 else WRONG, 1.0, SOURCE)

    def round_over(self) -> None:
        """See Guesses."""
        self._now = next(self._rounds, Round(1, 1))


@lru_cache(maxsize=64)
def mean_acceptance(tokens_a_round: float, threshold: float = 0.6, most: int = 6) -> float:
    """Mean confidence with which rounds give so many tokens when a draft of less than `threshold` ends the chain.

    Raises:
        ValueError: no drafter gives so many tokens, 1 < tokens < most + 1.
    """
    if not 1 < tokens_a_round < most + 1:
        raise ValueError(f"{tokens_a_round} tokens a round: must be between 1 and {most + 1}")
    low, high = 0.0, 1.0
    for _ in range(30):
        mean = (low + high) / 2
        low, high = (mean, high) if _expected_tokens(mean, threshold, most) < tokens_a_round else (low, mean)
    return mean


def _expected_tokens(mean: float, threshold: float, most: int, steps: int = 2000) -> float:
    """1 + sum over drafts of the chance that all before it were right and sure, and that it is right."""
    a, b = _SPREAD * mean, _SPREAD * (1 - mean)
    if a <= 0 or b <= 0:
        return 1.0 + most * (b <= 0)
    total = sure = 0.0
    # x = u ** (1 / a) takes away the pole at 0; that at 1 is left to midpoints, which is near enough.
    for step in range(steps):
        x = ((step + 0.5) / steps) ** (1 / a)
        weight = (1 - x) ** (b - 1)
        total += weight
        sure += weight * x * (x >= threshold)
    share = sure / total
    return 1.0 + mean * sum(share**index for index in range(most))
