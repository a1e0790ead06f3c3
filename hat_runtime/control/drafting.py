"""When drafting pays, how far, and when to stop it: pure functions of what was seen lately.

A draft is worth its time if the tokens that it is expected to add come faster than tokens come now: draft i, which
counts only if all before it are right as well, pays if P_i / (its cost) > tokens a second, the marginal rule of optimal
stopping (UCB-SpecStop, arXiv 2606.20591, is of that form).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

PAST = 0.8
"""Weight of the past in the moving averages (HAT, arXiv 2503.18989, section IV)."""
BINS = 10
PRIOR = 8.0
"""Observations that the drafter's own confidence counts for, until there are real ones."""
FORGET = 0.98
OTHER_PRIOR = 0.2
"""How often the second likeliest token is right where the likeliest was not, until it was seen."""

OFF_ABOVE = 1.03
"""Drafting is turned off when a token takes this many times what it would without."""
PROBE_ROUNDS = 16
"""Rounds with drafting after which its cost is judged."""
FIRST_PAUSE = 16
"""Rounds without drafting before it is tried again; doubles each time that it did not pay."""
LONGEST_PAUSE = 128


ROUNDS_PAST = 0.95
"""The same for rounds: whether drafting pays is judged over some twenty, because luck differs from round to round."""


def average(past: float, new: float, weight: float = PAST) -> float:
    """Moving average with `weight` on the past; 0 stands for nothing seen yet."""
    return new if past == 0.0 else weight * past + (1 - weight) * new


@dataclass
class Calibration:
    """From a drafter's confidence to how often such drafts were accepted lately."""

    _hits: dict[tuple[str, int], float] = field(default_factory=dict)
    _tries: dict[tuple[str, int], float] = field(default_factory=dict)

    def rate(self, source: str, confidence: float) -> float:
        """Expected acceptance, 0 to 1, of a draft by `source` with `confidence` (0 to 1)."""
        return self._estimate(self._key(source, confidence), confidence)

    def observe(self, source: str, confidence: float, accepted: bool) -> None:
        """A draft was checked by the target."""
        self._note(self._key(source, confidence), accepted)

    def rate_of_other(self, source: str, confidence: float, rank: int) -> float:
        """How often the next likeliest token of `rank` (1, 2, ...) is right where such a draft is refused, 0 to 1."""
        return self._estimate(self._key(f"{source}+{rank}", confidence), OTHER_PRIOR / rank)

    def observe_others(self, source: str, confidence: float, others: Sequence[int], right: int) -> None:
        """A draft was refused: `right` was the token, and `others` were the next likeliest ones, checked or not."""
        for rank, token in enumerate(others, start=1):
            self._note(self._key(f"{source}+{rank}", confidence), token == right)

    def _estimate(self, key: tuple[str, int], prior: float) -> float:
        hits, tries = self._hits.get(key, 0.0), self._tries.get(key, 0.0)
        return (hits + PRIOR * prior) / (tries + PRIOR)

    def _note(self, key: tuple[str, int], hit: bool) -> None:
        self._hits[key] = FORGET * self._hits.get(key, 0.0) + hit
        self._tries[key] = FORGET * self._tries.get(key, 0.0) + 1

    @staticmethod
    def _key(source: str, confidence: float) -> tuple[str, int]:
        return source, min(BINS - 1, int(confidence * BINS))


@dataclass(frozen=True)
class StopRule:
    """When a chain of drafts is long enough."""

    max_draft: int = 6
    """gamma"""
    threshold: float | None = None
    """eta: stop after a draft with less confidence; None: by expected gain."""

    def enough(self, confidences: Sequence[float], expected: Sequence[float], least_worth: float) -> bool:
        """Whether to stop after these drafts.

        Args:
            confidences: the drafter's own, of each draft.
            expected: acceptance of each, calibrated.
            least_worth: probability from which on one more draft pays (`least_worth`).
        """
        if len(confidences) >= self.max_draft:
            return True
        if not confidences:
            return False
        if self.threshold is not None:
            return confidences[-1] < self.threshold
        return math.prod(expected) < least_worth


@dataclass
class RoundTimes:
    """Moving averages over the rounds of a device, in seconds; 0: not seen yet."""

    draft_s: float = 0.0
    """One more draft on the device."""
    wait_s: float = 0.0
    """From sending a Step to its Result."""
    round_s: float = 0.0
    """A whole round with drafts."""
    tokens: float = 0.0
    """Tokens of such a round."""
    saved_s: float = 0.0
    """What such a round would be shorter without drafts."""

    def saw_draft(self, seconds: float) -> None:
        """One draft was made."""
        self.draft_s = average(self.draft_s, seconds)

    def saw_wait(self, seconds: float) -> None:
        """A Step that met no other was answered."""
        self.wait_s = average(self.wait_s, seconds)

    def saw_round(self, seconds: float, tokens: int, drafting_s: float) -> None:
        """A round has ended that gave `tokens` and spent `drafting_s` on drafts before its Step could leave."""
        self.round_s = average(self.round_s, seconds, ROUNDS_PAST)
        self.tokens = average(self.tokens, tokens, ROUNDS_PAST)
        self.saved_s = average(self.saved_s, drafting_s, ROUNDS_PAST)

    @property
    def token_s(self) -> float:
        """Seconds a token with drafting; 0 if unknown."""
        return self.round_s / self.tokens if self.tokens else 0.0

    @property
    def plain_s(self) -> float:
        """Estimated seconds a token without drafting; 0 if unknown."""
        return max(0.0, self.round_s - self.saved_s)

    @property
    def least_worth(self) -> float:
        """Probability of acceptance from which on one more draft pays: its cost over what a token takes now."""
        if not self.token_s or not self.draft_s:
            return 0.2
        return min(1.0, self.draft_s / self.token_s)

    def steps_left(self, elapsed_s: float) -> int:
        """Drafts that can be made before the reply comes (HAT, section III: lambda)."""
        if not self.draft_s:
            return 1
        return max(0, math.floor((self.wait_s - elapsed_s) / self.draft_s))


def worth_sending_ahead(chance: float, wait_s: float, compute_s: float) -> bool:
    """Whether a Step should leave before the one before it was answered.

    If everything before it turns out right (probability `chance`), a round's wait is saved; if not, the corrected Step
    may have to wait for the pass that it started.

    Args:
        chance: that all drafts before it and its own first token are accepted.
        wait_s: from sending a Step to its Result.
        compute_s: the cloud's part of it.
    """
    return chance * wait_s > (1 - chance) * compute_s


def window_tokens(wait_s: float, interval_s: float, acceptance: float) -> int:
    """Drafts in flight worth having: min(ceil(L1 / tau), ceil(ln .05 / ln a)), at least 1 (picospec.md 4.2)."""
    fill = math.ceil(wait_s / interval_s) if interval_s > 0 else 1
    if acceptance >= 1:
        return max(1, fill)
    useful = 1 if acceptance <= 0.05 else math.ceil(math.log(0.05) / math.log(acceptance))
    return max(1, min(fill, useful))


@dataclass
class Throttle:
    """Turns drafting off where it costs more than it gives, and tries again later; each failure doubles the pause."""

    _pause: int = FIRST_PAUSE
    _rounds_off: int = 0
    _rounds_on: int = 0

    @property
    def drafting(self) -> bool:
        """Whether the next round should draft."""
        return self._rounds_off == 0

    def after_round(self, times: RoundTimes) -> None:
        """A round has ended.

        Drafting stays on while a token takes at most OFF_ABOVE times what it would without, and the pause is forgotten
        once drafting has paid: between the two nothing changes.
        """
        if self._rounds_off:
            self._rounds_off -= 1
            self._rounds_on = 0
            return
        self._rounds_on += 1
        if self._rounds_on < PROBE_ROUNDS or not times.plain_s:
            return
        if times.token_s > OFF_ABOVE * times.plain_s:
            self._rounds_off = self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
        elif times.token_s < times.plain_s:
            self._pause = FIRST_PAUSE


TRIAL_TOKENS = 24
"""Tokens after which a way to decode is judged."""
BETTER = 0.97
"""A way on trial must take less than this much of the other's time, or it has lost."""
FIRST_STAY, LONGEST_STAY = 48, 768
"""Tokens before the slower way is tried again; doubles each time that it lost."""


@dataclass
class Pace:
    """Which of two ways to decode is faster, with drafts or without, where both can be tried (token mode).

    What is compared was measured and not estimated: seconds a token, over all answers of the device. The slower way is
    tried ever more seldom.
    """

    drafting: bool = True
    _on_trial: bool = False
    _left: int = TRIAL_TOKENS
    _stay: int = FIRST_STAY // 2
    _spent_s: float = 0.0
    _tokens: int = 0
    _other_s: float = 0.0
    """Seconds a token of the other way."""

    def saw(self, seconds: float, tokens: int = 1) -> None:
        """`tokens` came `seconds` after the one before them, by the present way."""
        self._spent_s += seconds
        self._tokens += tokens
        if self._tokens < self._left:
            return
        now_s = self._spent_s / self._tokens
        self._spent_s, self._tokens = 0.0, 0
        if not self._on_trial:
            self._turn(now_s, TRIAL_TOKENS, on_trial=True)
        elif now_s < BETTER * self._other_s:
            self._on_trial, self._left, self._stay = False, FIRST_STAY, FIRST_STAY
        else:
            self._stay = min(LONGEST_STAY, 2 * self._stay)
            self._turn(now_s, self._stay, on_trial=False)

    def _turn(self, now_s: float, tokens: int, *, on_trial: bool) -> None:
        self.drafting, self._other_s, self._left, self._on_trial = not self.drafting, now_s, tokens, on_trial
