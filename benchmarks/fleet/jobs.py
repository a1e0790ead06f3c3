"""What a simulated device's worker does for an answer, as in hat_runtime/device/jobs.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleet.worker import Job
from hat_runtime.device.chain import DraftPlan
from hat_runtime.device.drafting.base import Draft

if TYPE_CHECKING:
    from fleet.answer import Answer


class ShallowJob(Job):
    """A prompt's chunk."""

    def __init__(self, answer: Answer, start: int, end: int, upload: int) -> None:
        self.rows, self.total = end - start, end
        self._answer, self._start, self._upload = answer, start, upload

    def begin(self) -> None:
        """See Job."""

    def drafted(self) -> None:
        """It does not draft."""

    def done(self) -> None:
        """See Job."""
        self._answer.chunk_ready(self._start, self.total, self._upload)


class TurnJob(Job):
    """Judge a Step, if any; then draft."""

    def __init__(self, answer: Answer, judged: int, plan: DraftPlan, *, of_prompt: bool = False) -> None:
        self.judged = judged
        self.of_prompt = of_prompt
        self.accepted = self.tokens = self.made = 0
        self.refused = self.fresh = False
        self.verdicts: tuple[tuple[Draft, bool], ...] = ()
        self._answer = answer
        self._plan = plan

    def begin(self) -> None:
        """See Job."""
        answer = self._answer
        if self.judged:
            answer.judge(self)
            if not answer.left or not (self.fresh or not answer.in_flight):
                return
        drafts = answer.spec.drafts
        self.rows, self.total = int(self.fresh), answer.certain + len(drafts)
        self.drafting = not self._enough()

    def drafted(self) -> None:
        """See Job."""
        answer = self._answer
        answer.spec.drafts.append(answer.guesses.next(len(answer.spec.drafts)))
        self.made += 1
        self.rows, self.total = 1, answer.certain + len(answer.spec.drafts)
        self.drafting = not self._enough()

    def done(self) -> None:
        """See Job."""
        self._answer.turned(self)

    def _enough(self) -> bool:
        answer = self._answer
        drafts = answer.spec.drafts
        return len(drafts) + 1 >= answer.left or self._plan.enough(drafts)
