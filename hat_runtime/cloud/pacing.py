"""When the next pass starts, and how many rows of prompts it may have.

What is known of sessions and passes is put into the rules of control/holding.py and control/sharing.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hat_runtime.cloud.scheduler import Planned, SchedulerConfig
from hat_runtime.cloud.session import Session
from hat_runtime.control.cost import CostFit
from hat_runtime.control.holding import worth_waiting_s
from hat_runtime.control.sharing import Decoder

RETURN_MARGIN = 1.25
"""A session is due this many times its usual time away after its answer."""
PAST = 0.8
"""Weight of the past in the moving average."""
PATIENCE = 1.5
"""A session that stays away so many times longer than usual decodes no more."""


class Pacing:
    """For one engine's thread."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._short_pass_s = 0.0
        """Duration of the latest pass without prompts."""
        self._mixing_s = 0.0
        """What passes with prompts and others took beyond what the cost model expected; moving average."""
        self.cost = CostFit()
        """What a pass costs, as seen lately."""

    def saw_pass(self, passes: Sequence[Planned], forward_s: float, total_s: float) -> float | None:
        """A pass is over.

        Args:
            passes: what ran.
            forward_s: seconds inside the layers.
            total_s: seconds of the whole pass.

        Returns:
            The seconds that the cost model expected of the whole pass; None if there was no model yet.
        """
        totals = [planned.start + planned.rows for planned in passes]
        pairs = sum(planned.rows * total for planned, total in zip(passes, totals, strict=True))
        rows, cached = sum(planned.rows for planned in passes), sum(totals)
        predicted_s = self.cost.predicted_s(rows, pairs, cached)
        self.cost.observe(rows, pairs, total_s, cached)
        prompts = sum(self._config.is_prompt(planned.pieces[0].work) for planned in passes)
        if not prompts:
            self._short_pass_s = forward_s
        elif prompts < len(passes) and predicted_s is not None:
            beyond_s = min(max(0.0, total_s - predicted_s), predicted_s)
            self._mixing_s = PAST * self._mixing_s + (1 - PAST) * beyond_s
        return predicted_s

    def wait_s(self, sessions: Collection[Session], now: float) -> float:
        """How long to wait for sessions that are about to return, where that pays; else 0.

        Args:
            sessions: all sessions.
            now: monotonic seconds.
        """
        queued = sum(bool(session.queue) for session in sessions)
        prompts = sum(self._has_prompt(session) for session in sessions)
        courtesy = self._config.courtesy
        if not queued or (prompts and courtesy is None):
            return 0.0  # a prompt chunk is there to fill the time
        if prompts == queued:
            assert courtesy is not None
            return courtesy.wait_s(self._decoders(sessions, now), self.cost.fit(), self._longest(sessions))
        due_s = (
            session.answered + RETURN_MARGIN * session.away_s - now
            for session in sessions
            if session.answered and session.away_s is not None
        )
        return worth_waiting_s(queued - prompts, due_s, self._short_pass_s)

    def prompt_rows(self, sessions: Collection[Session], now: float) -> int:
        """Most rows of prompts in the next pass, at least 1; arguments as in `wait_s`."""
        most, courtesy = self._config.max_batch_tokens, self._config.courtesy
        if courtesy is None:
            return most
        decoders, cached = self._decoders(sessions, now), self._longest(sessions)
        alone = all(self._has_prompt(session) for session in sessions if session.queue)
        return courtesy.prompt_rows(
            decoders, self.cost.fit(), cached, most, alone=alone, mixing_s=self._mixing_s
        )

    def _has_prompt(self, session: Session) -> bool:
        return bool(session.queue) and self._config.is_prompt(session.queue[0])

    def _decoders(self, sessions: Collection[Session], now: float) -> list[Decoder]:
        """The sessions that decode: they have a Step in the queue, or are about to send one."""
        found = []
        for session in sessions:
            due_s, away_s = 0.0, session.away_s or 0.0
            if session.queue:
                if not session.queue[0].decodes:
                    continue
            else:
                gone_s = now - session.answered
                if not session.answered or gone_s > PATIENCE * away_s + self._short_pass_s:
                    continue
                due_s = away_s - gone_s
            if (cycle_s := away_s + self._short_pass_s) > 0:
                found.append(Decoder(due_s, cycle_s))
        return found

    def _longest(self, sessions: Collection[Session]) -> int:
        """Tokens that are computed of the longest text whose prompt waits for a pass."""
        return max(
            (session.queue[0].position for session in sessions if self._has_prompt(session)), default=0
        )
