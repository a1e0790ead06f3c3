"""One request on a device: uploads and rounds, as hat_runtime/device/answer.py runs them, without tensors.

Chunks are cut by the product's Chunker, drafts are planned and sent by its DraftPolicy. What a round brings is decided
by the drafts themselves, which know whether they are right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from fleet.guesses import RIGHT, Guesses
from fleet.jobs import ShallowJob, TurnJob
from fleet.link import Stream
from fleet.pod import blank_rows
from fleet.workload import Request
from hat_runtime.cloud.session import Event, Evicted, Session, StepDone, StepWork, Want
from hat_runtime.control.chunks import varying_ends
from hat_runtime.device.chain import DraftPlan, Speculation
from hat_runtime.device.drafting.base import DraftState
from hat_runtime.device.jobs import Turn
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.model.pages import PagedSequence
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire.frames import MAX_STEP_TOKENS

if TYPE_CHECKING:
    from fleet.device import Device

MOST_IN_FLIGHT = 32
"""Steps, the cloud's default limit."""
MOST_EVICTIONS = 8
"""GeneratorConfig.max_evictions"""


@dataclass(slots=True)
class Record:
    """What is known of a request when it is over."""

    request: Request
    began_s: float
    """When the device took it up."""
    ttft_s: float = 0.0
    tbt_s: float = 0.0
    """Mean over the answer."""
    tokens: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """(time between tokens, tokens) of each round."""
    chunk_tokens: int = 0
    predicted_s: float | None = None
    evictions: int = 0
    failed: bool = False
    """The cloud had no pages for it."""


@dataclass(eq=False, slots=True)
class _Step:
    epoch: int
    start: int
    rows: int
    want: Want
    submitted_s: float
    alone: bool
    first_round: bool = True
    """No other round was under way."""
    void: bool = False
    """Its Result is of no interest any more."""
    done: bool = False


class Answer:
    """One request under way."""

    def __init__(self, device: Device, request: Request, name: str, guesses: Guesses) -> None:
        self.device = device
        self.guesses = guesses
        self.spec = Speculation(PagedSequence(), DraftState(), SamplingParams())
        self.certain = request.prompt_tokens
        """Tokens of the text, drafts apart."""
        self.left = request.answer_tokens
        """Tokens that the text still grows by."""
        self.in_flight: deque[_Step] = deque()
        """Rounds that were sent and not judged."""
        self.record = Record(request, device.events.now)
        self._session = Session(name, 1 << 30, self._from_cloud)
        self._stream = Stream(device.events, device.up)
        self._unanswered: deque[_Step] = deque()
        self._epoch = self._sent_end = self._chunks = self._uploads = 0
        self._last_s = self.record.began_s
        self._ends: Iterator[int] = iter(())
        self._held_back: int | None = None
        self._turning = self._waiting = self._evicted = False

    def begin(self) -> None:
        """Open the session and send the prompt."""
        self.device.pod.open(self._session)
        self._upload()

    # Uploads ---------------------------------------------------------------------------------------------------------

    def _upload(self) -> None:
        self._uploads += 1
        self._ends = varying_ends(0, self.certain, self._chunk_at)
        self._next_chunk(0)

    def _chunk_at(self, start: int) -> int:
        device, record, first = self.device, self.record, self._chunks == 0
        self._chunks += 1
        chunk = device.chunker.size(start, self.certain, device.cost.shallow, first=first)
        if first:
            record.predicted_s = device.chunker.predicted_s(start, self.certain, chunk, device.cost.shallow)
        record.chunk_tokens = chunk
        return min(chunk or MAX_STEP_TOKENS, MAX_STEP_TOKENS)

    def _next_chunk(self, start: int) -> None:
        if len(self._unanswered) >= MOST_IN_FLIGHT:
            self._held_back = start
            return
        if (end := next(self._ends, None)) is not None:
            self.device.worker.submit(ShallowJob(self, start, end, self._uploads))

    def chunk_ready(self, start: int, end: int, upload: int) -> None:
        """A chunk's shallow states are there."""
        if upload == self._uploads:
            self._submit(start, end - start, Want.LAST if end == self.certain else Want.NONE)
            self._sent_end = end
            self._next_chunk(end)

    # Rounds ----------------------------------------------------------------------------------------------------------

    def judge(self, turn: TurnJob) -> None:
        """What the head says of the Step's drafts: the first ones that are right, and the token behind them."""
        drafts, most = self.spec.drafts, min(turn.judged, self.left)
        while turn.tokens < most and not turn.fresh:
            index = turn.tokens
            turn.tokens += 1
            if index < len(drafts) and drafts[index].token == RIGHT:
                turn.accepted += 1
            else:
                turn.fresh, turn.refused = True, index < len(drafts)
        turn.verdicts = tuple((draft, True) for draft in drafts[: turn.accepted])
        if turn.refused:
            turn.verdicts += ((drafts[turn.accepted], False),)
        del drafts[: turn.accepted]
        self.certain += turn.tokens
        self.left -= turn.tokens
        if turn.fresh:
            drafts.clear()
        if not turn.of_prompt:
            self.guesses.round_over()

    def turned(self, turn: TurnJob) -> None:
        """Tokens are known, or one more draft."""
        self._turning = False
        now, policy = self.device.events.now, self.device.policy
        drafting_s = now - turn.draft_from if turn.draft_from >= 0 else 0.0
        learnt = Turn([0] * turn.tokens, judged=turn.verdicts, draft_s=drafting_s, drafts=turn.made)
        policy.learn(learnt)
        if turn.judged:
            self._count(turn, learnt, now - self._last_s)
            self._last_s = now
            if turn.fresh:
                self._discard()
                self._sent_end = min(self._sent_end, self.certain - 1)
            if not self.left:
                self._end()
                return
        if self._evicted:
            self._restart()
            return
        if turn.judged:
            if not self.in_flight:
                self._send()
            self._waiting = True
            self.device.waiting += 1
        elif not turn.made:  # the drafter had no guess that was wanted
            self._go_on()
            return
        self._ahead()

    def _count(self, turn: TurnJob, learnt: Turn, took_s: float) -> None:
        record, device = self.record, self.device
        if record.tokens == 0:
            record.ttft_s = took_s
            device.chunker.saw_ttft(record.predicted_s, took_s)
        else:
            record.gaps.append((took_s / turn.tokens, turn.tokens))
            device.policy.after_round(took_s, learnt)
        record.tokens += turn.tokens

    def _send(self) -> None:
        """The newest certain token's row and those of the drafts behind it, as far as they were not sent."""
        first = max(self._sent_end, self.certain - 1)
        self._sent_end = self.certain + len(self.spec.drafts)
        alone = not self.in_flight
        step = self._submit(first, self._sent_end - first, Want.ALL)
        step.first_round = alone
        self.in_flight.append(step)

    def _ahead(self) -> None:
        """Draft on, and send what is likely to be right, until the oldest round's Result is there."""
        policy, spec, now = self.device.policy, self.spec, self.device.events.now
        while not self.in_flight[0].done and policy.works_ahead(self.device.waiting):
            sent = self._sent_end - self.certain
            plan = policy.ahead(spec, sent, now - self.in_flight[0].submitted_s)
            if plan is None and policy.send_ahead(spec, sent, len(self.in_flight)):
                self._send()
                continue
            if plan is None:
                break
            self._turning = True
            self.device.worker.submit(TurnJob(self, 0, plan))
            return
        self._go_on()

    def _go_on(self) -> None:
        """Judge the oldest round if its Result is there."""
        if self._turning or not self.in_flight or not self.in_flight[0].done:
            return
        step, device = self.in_flight.popleft(), self.device
        self._stop_waiting()
        if step.first_round:
            device.policy.times.saw_wait(device.events.now - step.submitted_s)
        self._turn(step.rows)

    def _turn(self, judged: int, *, of_prompt: bool = False) -> None:
        guesses, plan = self.guesses, self.device.policy.plan()
        if (
            guesses.scripted_drafts is not None
        ):  # asked anew for each draft: the job judges the round before first
            plan = DraftPlan(lambda drafts: len(drafts) >= (guesses.scripted_drafts or 0))
        self._turning = True
        self.device.worker.submit(TurnJob(self, judged, plan, of_prompt=of_prompt))

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self.device.waiting -= 1

    # The cloud -------------------------------------------------------------------------------------------------------

    def _submit(self, start: int, rows: int, want: Want) -> _Step:
        step = _Step(self._epoch, start, rows, want, self.device.events.now, not self._unanswered)
        self._unanswered.append(step)
        self._stream.send(rows * self.device.row_bytes, partial(self._arrive, step))
        return step

    def _arrive(self, step: _Step) -> None:
        work = StepWork(step.epoch, step.start, step.want, blank_rows(step.rows), self.device.events.now)
        work.__dict__["finite"] = True  # nobody need look for NaN in rows that are not there
        self.device.pod.submit(self._session, work)

    def _from_cloud(self, event: Event) -> None:
        """Called by the pod: what goes down arrives later."""
        device, rows = self.device, 0
        hints: pb.CostHints | None = None
        if isinstance(event, StepDone) and not event.stale:
            rows = {Want.NONE: 0, Want.LAST: 1, Want.ALL: event.work.n}[event.work.want]
            hints = device.pod.hints() if event.work.want is Want.LAST else None
        _, arrival_s = device.down.send(rows * device.row_bytes)
        device.events.at(arrival_s, self._receive, event, hints)

    def _receive(self, event: Event, hints: pb.CostHints | None) -> None:
        if isinstance(event, StepDone):
            self._receive_result(event, hints)
        elif isinstance(event, Evicted):
            self._receive_eviction()
        else:
            self.record.failed = True
            self._end()

    def _receive_result(self, done: StepDone, hints: pb.CostHints | None) -> None:
        step, work, device = self._unanswered.popleft(), done.work, self.device
        if not done.stale:
            device.view.learn(
                step.rows * device.row_bytes,
                step.submitted_s,
                device.events.now,
                work.waited_s,
                work.compute_s,
                max(0, work.batch_tokens - step.rows),
                alone=step.alone,
                chunk=step.want is not Want.ALL,
            )
        if hints is not None:
            device.view.cloud_cost = hints
        if self._held_back is not None:
            start, self._held_back = self._held_back, None
            self._next_chunk(start)
        if step.void or done.stale:
            return
        if step.want is Want.LAST:
            self._turn(1, of_prompt=True)
        elif step.want is Want.ALL:
            step.done = True
            device.policy.compute_s = work.compute_s
            self._go_on()

    def _receive_eviction(self) -> None:
        """The cloud gave the pages away: all certain tokens go up again."""
        self._discard(force=True)
        self._uploads += 1
        self._held_back = None
        self._stop_waiting()
        self.record.evictions += 1
        self._evicted = True
        if not self._turning:
            self._restart()

    def _restart(self) -> None:
        self._evicted = False
        self.spec.drafts.clear()
        if self.record.evictions > MOST_EVICTIONS:
            self.record.failed = True
            self._end()
        else:
            self._upload()

    def _discard(self, *, force: bool = False) -> None:
        """Steps under way are void (CloudSession.discard)."""
        self.in_flight.clear()
        if not self._unanswered and not force:
            return
        for _ in range(self._stream.drop_unsent()):
            self._unanswered.pop()
        for step in self._unanswered:
            step.void = True
        self._epoch += 1

    def _end(self) -> None:
        record = self.record
        if record.tokens > 1:
            record.tbt_s = (self._last_s - record.began_s - record.ttft_s) / (record.tokens - 1)
        self._stop_waiting()
        self._uploads += 1
        self.device.pod.close(self._session)
        self.device.ended(record)
