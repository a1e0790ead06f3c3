"""A cloud pod: the product's scheduler, pacing, sessions and pages; only the layers are a duration.

What Engine does between passes (hat_runtime/cloud/engine.py: settling the heads of queues, completing pieces) is thread
work there and is repeated here without tensors.
"""

from __future__ import annotations

from typing import cast

import grpc
import torch

from fleet.costs import CloudCost
from fleet.events import Events
from hat_runtime.cloud.assembly import cost_hints
from hat_runtime.cloud.engine import PAGE_WAIT_S
from hat_runtime.cloud.pacing import Pacing
from hat_runtime.cloud.scheduler import Plan, Planned, Scheduler, SchedulerConfig
from hat_runtime.cloud.session import Evicted, Failed, Session, StepDone, StepWork, Want, violation
from hat_runtime.model.pages import KvCache
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

PAGE_TOKENS = 16


def blank_rows(rows: int) -> torch.Tensor:
    """Stands for shallow states: the scheduler only counts them, and counts those of a tensor four times as long."""
    return cast(torch.Tensor, range(rows))


class Pod:
    """One replica."""

    def __init__(self, events: Events, cost: CloudCost, config: SchedulerConfig, kv_tokens: int) -> None:
        """Make an idle pod whose cache holds `kv_tokens` tokens."""
        self._events = events
        self._cost = cost
        self._cache = KvCache(
            layers=1,
            kv_heads=1,
            head_dim=1,
            num_pages=max(1, kv_tokens // PAGE_TOKENS),
            page_tokens=PAGE_TOKENS,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self._scheduler = Scheduler(self._cache, config)
        self._pacing = Pacing(config)
        self._sessions: dict[str, Session] = {}
        self._inbox: list[tuple[Session, StepWork]] = []
        self._running: list[Planned] = []
        self._prompt_rows = config.max_batch_tokens
        self._alarm = 0
        self.busy_s = 0.0
        """Time spent in passes."""
        self.passes = 0
        self.rows = 0
        self.most_sessions = 0

    @property
    def sessions(self) -> int:
        """Open ones."""
        return len(self._sessions)

    def open(self, session: Session) -> None:
        """Admit a session."""
        session.last_active = self._events.now
        self._sessions[session.id] = session
        self.most_sessions = max(self.most_sessions, len(self._sessions))

    def close(self, session: Session) -> None:
        """Forget a session, whatever it waits for, and free its pages."""
        if self._sessions.pop(session.id, None) is not None:
            session.queue.clear()
            self._cache.release(session.sequence)

    def submit(self, session: Session, work: StepWork) -> None:
        """Take a Step that has just arrived; the session's `deliver` gets the answer."""
        self._inbox.append((session, work))
        if not self._running:
            self._hold()

    def hints(self) -> pb.CostHints:
        """What passes cost lately, as RuntimeService says it."""
        return cost_hints(self._pacing.cost.fit(), self._prompt_rows)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is free or has one owner."""
        self._cache.check(session.sequence for session in self._sessions.values())

    def _hold(self) -> None:
        """Between passes: take what has arrived, then wait where that pays, or start."""
        self._take_inbox()
        self._alarm += 1
        wait_s = self._pacing.wait_s(self._sessions.values(), self._events.now)
        if wait_s > 0:
            self._events.at(self._events.now + wait_s, self._wake, self._alarm)
        else:
            self._start()

    def _wake(self, alarm: int) -> None:
        if alarm == self._alarm and not self._running:
            self._take_inbox()
            self._start()

    def _take_inbox(self) -> None:
        for session, work in self._inbox:
            if session.id in self._sessions:
                session.last_active = self._events.now
                session.note_return(work)
                session.epoch = max(session.epoch, work.epoch)
                session.queue.append(work)
        self._inbox.clear()

    def _start(self) -> None:
        now = self._events.now
        for session in self._sessions.values():
            if session.queue:
                self._settle_head(session)
        self._alarm += 1
        sessions = self._sessions.values()
        if not any(session.queue for session in sessions):
            return
        self._prompt_rows = self._pacing.prompt_rows(sessions, now)
        plan = self._scheduler.plan(sessions, now, self._prompt_rows)
        self._apply_evictions(plan)
        if not plan.passes:
            self._events.at(now + PAGE_WAIT_S, self._wake, self._alarm)
            return
        rows, pairs, cached = 0, 0.0, 0.0
        for planned in plan.passes:
            count, total = planned.rows, planned.start + planned.rows
            rows, pairs, cached = rows + count, pairs + count * total, cached + total
            for piece in planned.pieces:
                piece.work.last_pass = now
        took_s = self._cost.pass_s(rows, pairs, cached)
        self._running = plan.passes
        self.passes += 1
        self.rows += rows
        self.busy_s += took_s
        self._events.at(now + took_s, self._finish, rows, took_s)

    def _settle_head(self, session: Session) -> None:
        while session.queue:
            work = session.queue[0]
            if work.epoch < session.epoch or (session.lost_pages and work.start_pos > session.committed):
                session.queue.popleft()
                self._answer(session, StepDone(work, stale=True))
                continue
            if work.done:
                return
            if (wrong := violation(session, work, session.committed)) is not None:
                raise RuntimeError(f"the simulated device broke the protocol: {wrong.text}")
            session.lost_pages = False
            if work.start_pos < session.committed:
                self._cache.truncate(session.sequence, work.start_pos)
            return

    def _apply_evictions(self, plan: Plan) -> None:
        for session in plan.evicted:
            session.lost_pages = True
            session.deliver(Evicted(session.committed))
            while session.queue:
                self._answer(session, StepDone(session.queue.popleft(), stale=True))
        if (refused := plan.refused) is not None:
            self.close(refused)
            refused.deliver(
                Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "the KV cache is full", retry_after_s=1.0)
            )

    def _finish(self, rows: int, took_s: float) -> None:
        passes, self._running = self._running, []
        for planned in passes:
            # The device has closed the session meanwhile: its pages are free already.
            if planned.session.id in self._sessions:
                planned.session.sequence.length = planned.start + planned.rows
                self._complete(planned, took_s, rows)
        self._pacing.saw_pass(passes, took_s, took_s)
        self._hold()

    def _complete(self, planned: Planned, took_s: float, rows: int) -> None:
        session, now = planned.session, self._events.now
        for piece in planned.pieces:
            work = piece.work
            work.done = piece.last
            work.compute_s += took_s
            work.batch_tokens = rows
            if work.left:
                return
            session.queue.popleft()
            work.waited_s = now - work.arrived - work.compute_s
            if work.want is not Want.NONE:
                session.answered = now
            self._answer(session, StepDone(work))

    def _answer(self, session: Session, done: StepDone) -> None:
        session.last_active = self._events.now
        session.deliver(done)
