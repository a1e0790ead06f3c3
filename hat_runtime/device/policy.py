"""How a device drafts: its settings, and what it has learnt of drafter, link and cloud."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hat_runtime.control.cost import CostFit
from hat_runtime.control.drafting import (
    Calibration,
    RoundTimes,
    StopRule,
    Throttle,
    average,
    window_tokens,
    worth_sending_ahead,
)
from hat_runtime.device.chain import NO_DRAFTS, DraftPlan, Speculation
from hat_runtime.device.drafting.base import Draft
from hat_runtime.device.jobs import Turn
from hat_runtime.device.verify import COUPLED, SAMPLERS
from hat_runtime.errors import UsageError

MOST_AHEAD = 32
"""Drafts that are never exceeded, sent or not."""
MOST_ALTERNATIVES = 3
"""Of one draft, where they are chosen by their worth."""
UNKNOWN_ROW_WORTH = 0.05
"""Tokens that an alternative must be expected to give while its cost is not known."""


@dataclass(frozen=True)
class DraftConfig:
    """Settings of drafting."""

    max_draft: int = 6
    """gamma: most drafts of a round."""
    stop_threshold: float | None = None
    """eta: a round's drafts end with one of less confidence; None: when one more is not worth its time."""
    window: int | None = None
    """Rounds in flight; None: as many as pay."""
    branches: int = 1
    """Candidates for the token behind a round whose continuations are drafted while the round is checked; 0: the
    device waits."""
    alternatives: int | None = None
    """Other candidates for each draft that are checked along with it; None: those that are worth a row, at most
    MOST_ALTERNATIVES. Sampler "rejection" has none."""
    sampler: str = COUPLED
    adaptive: bool = True
    """Stop drafting where it does not pay."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_draft <= MOST_AHEAD:
            raise UsageError(f"--max-draft {self.max_draft}: must be 1 to {MOST_AHEAD}")
        if self.stop_threshold is not None and not 0 <= self.stop_threshold <= 1:
            raise UsageError(f"--stop-threshold {self.stop_threshold}: must be auto or 0 to 1")
        if self.window is not None and not 1 <= self.window <= 16:
            raise UsageError(f"--window {self.window}: must be auto or 1 to 16 rounds")
        if not 0 <= self.branches <= 8:
            raise UsageError(f"--branches {self.branches}: must be 0 to 8")
        if self.alternatives is not None and not 0 <= self.alternatives <= 8:
            raise UsageError(f"--alternatives {self.alternatives}: must be auto or 0 to 8")
        if self.sampler not in SAMPLERS:
            raise UsageError(f"--sampler {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")


def most_round_rows(config: DraftConfig) -> int:
    """Rows of a round with the most drafts and alternatives; one that was drafted ahead of may have more."""
    others = MOST_ALTERNATIVES if config.alternatives is None else config.alternatives
    return config.max_draft + 1 + config.max_draft * others


@dataclass
class DraftPolicy:
    """Decides for all answers of a device. For the event loop's thread; plans are read by the worker."""

    config: DraftConfig
    available: bool
    """There is a drafter."""
    calibration: Calibration = field(default_factory=Calibration)
    times: RoundTimes = field(default_factory=RoundTimes)
    throttle: Throttle = field(default_factory=Throttle)
    compute_s: float = 0.0
    """The cloud's part of a round, seen last."""
    row_link_s: float = 0.0
    """What the link takes for one more row, up and down."""
    _pass_cost: CostFit = field(default_factory=CostFit)
    _company: float = 1.0
    """Rows of a pass for each of the own ones: whoever shares it waits for them too."""
    _blocking_s: float = 0.0
    """Time of the drafts that the round under way had to wait for."""

    @property
    def drafting(self) -> bool:
        """Whether the next round should draft."""
        return self.available and (self.throttle.drafting or not self.config.adaptive)

    def plan(self, *, alternatives: bool = False) -> DraftPlan:
        """For a round's drafts; `alternatives`: the cloud checks such."""
        if not self.drafting:
            return NO_DRAFTS
        worth = self.times.least_worth
        if not alternatives or not self._most_alternatives:
            return DraftPlan(lambda drafts: self._full(drafts, worth))
        return DraftPlan(
            lambda drafts: self._full(drafts, worth), self._most_alternatives, self._worth_checking
        )

    @property
    def _most_alternatives(self) -> int:
        return MOST_ALTERNATIVES if self.config.alternatives is None else self.config.alternatives

    def _worth_checking(self, drafts: Sequence[Draft]) -> int:
        """How many alternatives of the last of these drafts are worth a row.

        Each is right with the chance that all drafts before it are, that its own draft is not, and that it is then the
        token: a row pays if that chance of one token more exceeds the row's time over a token's.
        """
        if self.config.alternatives is not None:
            return self.config.alternatives
        *before, draft = drafts
        missed = math.prod(self.expected(before)) * (
            1 - self.calibration.rate(draft.source, draft.confidence)
        )
        for rank in range(1, MOST_ALTERNATIVES + 1):
            chance = self.calibration.rate_of_other(draft.source, draft.confidence, rank)
            if missed * chance < self.least_row_worth:
                return rank - 1
        return MOST_ALTERNATIVES

    @property
    def least_row_worth(self) -> float:
        """Tokens that a row more must be expected to give."""
        fit = self._pass_cost.fit()
        token_s = self.times.token_s
        if fit is None or not token_s:
            return UNKNOWN_ROW_WORTH
        return (fit.per_token_s * self._company + self.row_link_s) / token_s

    def saw_pass(self, batch_tokens: int, rows: int, compute_s: float) -> None:
        """A round of `rows` was computed in `compute_s` seconds together with others, `batch_tokens` rows in all."""
        self.compute_s = compute_s
        self._pass_cost.observe(batch_tokens, 0.0, compute_s)
        self._company = average(self._company, max(1.0, batch_tokens / rows))

    def works_ahead(self, answers: int) -> bool:
        """Whether to draft while a round is checked, with so many answers waiting for the cloud.

        Not with several: what is drafted ahead for one of them delays the turns of the others, which costs more than it
        gives (docs/decisions/0011-drafting.md).
        """
        return answers <= 1 or not self.config.adaptive

    def ahead(
        self, spec: Speculation, sent: int, elapsed_s: float, *, alternatives: bool = False
    ) -> DraftPlan | None:
        """For one more draft while a round is checked; None: enough.

        Args:
            spec: the answer's chain.
            sent: its drafts that were sent.
            elapsed_s: since then.
            alternatives: the cloud checks such.
        """
        unsent = len(spec.drafts) - sent
        if not self.drafting or not self.config.branches or len(spec.drafts) >= MOST_AHEAD:
            return None
        if self.times.steps_left(elapsed_s) < 1:
            return None
        if unsent > self.config.max_draft or (
            unsent > 1 and self._full(spec.drafts[sent + 1 :], self.times.least_worth)
        ):
            return None
        goal = len(spec.drafts) + 1
        if unsent == 0:  # judged by the round under way, which has left without alternatives to it
            return DraftPlan(lambda drafts: len(drafts) >= goal, self.config.branches - 1)
        if not alternatives:
            return DraftPlan(lambda drafts: len(drafts) >= goal)
        return DraftPlan(lambda drafts: len(drafts) >= goal, self._most_alternatives, self._worth_checking)

    def branch(self, spec: Speculation, sent: int, elapsed_s: float) -> tuple[int, DraftPlan] | None:
        """Another candidate for the first draft that was not sent, and how far to draft behind it; None: enough."""
        room = min(self.config.max_draft, self.times.steps_left(elapsed_s) - 1)
        if not self.drafting or room < 1 or len(spec.drafts) <= sent:
            return None
        taken = spec.branches if spec.point == sent else ()
        left = [token for token in spec.drafts[sent].others[: self.config.branches - 1] if token not in taken]
        if not left:
            return None
        return left[0], DraftPlan(lambda drafts: len(drafts) >= room)

    def send_ahead(self, spec: Speculation, sent: int, in_flight: int) -> bool:
        """Whether the drafts that were not sent should leave before the rounds in flight were checked."""
        window = self.config.window
        if len(spec.drafts) <= sent or (window is not None and in_flight >= window):
            return False
        chance = math.prod(self.expected(spec.drafts[: sent + 1]))
        if window is None:
            acceptance = chance ** (1 / (sent + 1))
            if len(spec.drafts) > window_tokens(self.times.wait_s, self.times.draft_s, acceptance):
                return False
        return window is not None or worth_sending_ahead(chance, self.times.wait_s, self.compute_s)

    def expected(self, drafts: Sequence[Draft]) -> list[float]:
        """Acceptance of each draft, calibrated."""
        return [self.calibration.rate(draft.source, draft.confidence) for draft in drafts]

    def learn(self, turn: Turn) -> None:
        """What the target said of drafts, and what drafts cost."""
        for (draft, accepted), token in zip(turn.judged, turn.tokens, strict=False):
            self.calibration.observe(draft.source, draft.confidence, accepted)
            if not accepted:
                self.calibration.observe_others(draft.source, draft.confidence, draft.others, token)
        if turn.drafts:
            self.times.saw_draft(turn.draft_s / turn.drafts)

    def after_round(self, took_s: float, turn: Turn) -> None:
        """A judged round took `took_s` seconds since the one before it."""
        if self.drafting:
            self.times.saw_round(took_s, len(turn.tokens), self._blocking_s)
        self._blocking_s = turn.draft_s
        self.throttle.after_round(self.times)

    def _full(self, drafts: Sequence[Draft], least_worth: float) -> bool:
        """Whether a round has drafts enough."""
        rule = StopRule(self.config.max_draft, self.config.stop_threshold)
        return rule.enough([draft.confidence for draft in drafts], self.expected(drafts), least_worth)
