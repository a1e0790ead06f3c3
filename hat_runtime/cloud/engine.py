"""The cloud's engine: one thread that owns the layers and the KV cache and runs pass after pass.

Everything reaches it through a queue and leaves it through `loop.call_soon_threadsafe`, so it never blocks the event
loop. One thread only, because torch's OpenMP pool belongs to the thread that calls it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import torch

from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.pacing import Pacing
from hat_runtime.cloud.scheduler import Plan, Planned, Scheduler, SchedulerConfig
from hat_runtime.cloud.session import (
    Event,
    Evicted,
    Failed,
    Ready,
    Session,
    StepDone,
    StepWork,
    Want,
    unknown_session,
    violation,
)
from hat_runtime.cloud.session_table import SessionTable
from hat_runtime.control.cost import CostFit
from hat_runtime.model.runner import LayerRunner, Segment

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
"""Longest wait for something to do before idle sessions are looked at."""
PAGE_WAIT_S = 0.05
"""Longest wait before queued Steps look for pages again."""


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    idle_ttl_s: float = 600.0
    """A session without a Step for this long is ended."""
    lost_share: float = 0.5
    """Most of the KV pages that sessions without a stream may keep, 0 to 1."""
    threads: int | None = None
    """Threads for torch's operators; None for torch's choice."""


class Engine:
    """Continuous batching over sessions."""

    def __init__(
        self,
        runner: LayerRunner,
        config: EngineConfig,
        metrics: CloudMetrics,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self._config = config
        self._scheduler = Scheduler(runner.cache, config.scheduler)
        self._pacing = Pacing(config.scheduler)
        self._metrics = metrics
        self._loop = loop
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sessions = SessionTable(runner.cache, metrics, config.lost_share)
        self._events: list[tuple[Callable[[Event], None], Event]] = []
        self._thread = threading.Thread(target=self._run, name="hat-engine", daemon=True)
        self._round_began = 0.0
        self._blocked = False  # the last plan found nothing to run: queued Steps wait for pages
        self.prompt_rows = config.scheduler.max_batch_tokens
        """Most rows of prompts in the latest pass; read by any thread."""
        self.failed: BaseException | None = None
        """What ended the thread; None while it works."""
        self.pass_began: float | None = None
        """Monotonic seconds when the pass that runs began; None between passes. Read by any thread."""

    @property
    def cost(self) -> CostFit:
        """What a pass costs, as seen lately."""
        return self._pacing.cost

    # Called from any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current pass and wait for it."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    def open(self, session: Session) -> None:
        """Admit a session."""
        self._inbox.put(lambda: self._sessions.open(session, self._clock()))

    def submit(self, session: Session, work: StepWork) -> None:
        """Queue a Step; exactly one StepDone or Failed answers it, unless the session is closed first."""
        self._inbox.put(lambda: self._submit(session, work))

    def close(self, session: Session) -> None:
        """Forget a session, whatever it waits for, and free its pages."""
        self._inbox.put(lambda: self._sessions.close(session))

    def lose(self, session: Session) -> None:
        """The session's stream is gone: drop what it waits for; its KV cache stays while others can spare the room."""
        self._inbox.put(lambda: self._sessions.lose(session, self._clock()))

    def take_over(self, session: Session, deliver: Callable[[Event], None]) -> None:
        """Another stream has the session from now on. Its first event is Ready, or Failed if the session is gone.

        Args:
            session: with or without a stream; Steps of the old one that have not run are dropped.
            deliver: takes the session's events from now on; none of those before.
        """
        self._inbox.put(lambda: self._take_over(session, deliver))

    async def idle(self) -> None:
        """Wait until everything submitted so far was taken up, and check that no page is lost.

        Raises:
            RuntimeError: the pages are not accounted for.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def check() -> None:
            try:
                self.check_integrity()
            except RuntimeError as error:
                done.get_loop().call_soon_threadsafe(done.set_exception, error)
            else:
                done.get_loop().call_soon_threadsafe(done.set_result, None)

        self._inbox.put(check)
        await done

    # The engine's thread ---------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free + owned == total."""
        self._sessions.check()

    def _run(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        try:
            while self._take_commands():
                self._reap_idle()
                passes, forward_s = self._step()
                total_s = time.perf_counter() - self._round_began
                self._flush()
                if passes:
                    self._observe(passes, forward_s, total_s)
        except BaseException as error:
            self.failed = error
            log.exception("the engine's thread ended")
            for session in list(self._sessions.values()):
                self._fail(
                    session, Failed(grpc.StatusCode.UNAVAILABLE, "the engine failed; see the cloud's log")
                )
            self._flush()

    def _take_commands(self) -> bool:
        """Apply what is in the inbox; wait for something if there is no work. False: stop."""
        queued = any(session.queue for session in self._sessions.values())
        waited_from = time.perf_counter()
        try:
            try:
                timeout = PAGE_WAIT_S if queued else IDLE_WAIT_S
                command = self._inbox.get(block=self._blocked or not queued, timeout=timeout)
            finally:
                self._round_began = time.perf_counter()
            while True:
                if command is None:
                    return False
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            if not queued and time.perf_counter() - waited_from >= IDLE_WAIT_S:
                self.check_integrity()  # not between the rounds of an answer: it would be in their way
            return self._hold()

    def _hold(self) -> bool:
        """Wait for sessions that are about to return, where that pays. False: stop."""
        while (wait_s := self._pacing.wait_s(self._sessions.values(), self._clock())) > 0:
            try:
                command = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                break
            finally:
                self._round_began = time.perf_counter()
            if command is None:
                return False
            command()
        return True

    def _submit(self, session: Session, work: StepWork) -> None:
        if session.id not in self._sessions:
            return
        session.last_active = self._clock()
        session.note_return(work)
        session.epoch = max(session.epoch, work.epoch)
        session.queue.append(work)

    def _take_over(self, session: Session, deliver: Callable[[Event], None]) -> None:
        found = self._sessions.take_over(session, deliver, self._clock())
        event = Ready(session.committed) if found else unknown_session(session.id)
        self._events.append((deliver, event))

    def _tell(self, session: Session, event: Event) -> None:
        """Deliver at the end of the round, to the stream that the session has now."""
        self._events.append((session.deliver, event))

    def _fail(self, session: Session, failure: Failed) -> None:
        self._sessions.close(session)
        self._tell(session, failure)

    def _reap_idle(self) -> None:
        limit = self._clock() - self._config.idle_ttl_s
        for session in [s for s in self._sessions.values() if not s.queue and s.last_active < limit]:
            text = f"the session was idle for {self._config.idle_ttl_s:g} s; open a new one"
            self._fail(session, Failed(grpc.StatusCode.ABORTED, text))

    def _step(self) -> tuple[list[Planned], float]:
        """Plan and run one pass; what ran, and the seconds inside the layers."""
        for session in list(self._sessions.values()):
            try:
                self._settle_head(session)
            except Exception as error:
                self._fail_poisoned(session, error)
        now = self._clock()
        self.prompt_rows = self._pacing.prompt_rows(self._sessions.values(), now)
        plan = self._scheduler.plan(self._sessions.values(), now, self.prompt_rows)
        self._apply_evictions(plan)
        self._blocked = not plan.passes
        if not plan.passes:
            return [], 0.0
        forward_s = self._pass(plan.passes)
        return ([], 0.0) if forward_s is None else (plan.passes, forward_s)

    def _settle_head(self, session: Session) -> None:
        """Answer stale Steps at the head of the queue, check the next one, and roll back to its start."""
        while session.queue:
            work = session.queue[0]
            if work.epoch < session.epoch or (session.lost_pages and work.start_pos > session.committed):
                session.queue.popleft()
                self._answer(session, StepDone(work, stale=True))
                self._metrics.stale.inc()
                continue
            if work.done:
                return
            if (wrong := violation(session, work, session.committed)) is not None:
                self._fail(session, wrong)
                return
            session.lost_pages = False
            if self._settle(session, work):
                return

    def _settle(self, session: Session, work: StepWork) -> bool:
        """Bring the session to the start of a Step that is right; False if it left the queue without compute."""
        self._truncate(session, work.start_pos)
        return True

    def _truncate(self, session: Session, length: int) -> None:
        if length < session.committed:
            self._metrics.truncated.inc(session.committed - length)
            self.runner.cache.truncate(session.sequence, length)

    def _apply_evictions(self, plan: Plan) -> None:
        for session in plan.evicted:
            session.lost_pages = True
            self._forget(session)
            self._metrics.evictions.inc()
            self._tell(session, Evicted(session.committed))
            while session.queue:
                self._answer(session, StepDone(session.queue.popleft(), stale=True))
                self._metrics.stale.inc()
        if plan.refused is not None:
            failure = Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, plan.reason, retry_after_s=1.0)
            self._fail(plan.refused, failure)

    def _forget(self, session: Session) -> None:
        """The session's KV cache is gone: drop what goes with it."""

    def _pass(self, passes: list[Planned], *, again: bool = False) -> float | None:
        """Run one pass and answer what it completes; seconds inside the layers, None if it failed.

        A pass that raises is repeated (`again`), session by session: what raised by chance is right then, and a session
        that poisons its passes is alone.
        """
        now, began = self._clock(), time.perf_counter()
        for planned in passes:
            for piece in planned.pieces:
                piece.work.last_pass = now
                if not piece.work.done and not again:
                    self._metrics.queue_seconds.observe(now - piece.work.arrived)
        try:
            outputs = self._forward(passes)
        except Exception as error:
            if again or is_fatal(error):
                self._fail_poisoned(passes[0].session, error)
                return None
            log.warning(
                "a pass over %d sessions failed (%s); trying each alone", len(passes), type(error).__name__
            )
            for planned in passes:
                self._pass([planned], again=True)
            return None
        forward_s = time.perf_counter() - began
        tokens = sum(planned.rows for planned in passes)
        for planned, deep in zip(passes, outputs, strict=True):
            try:
                self._complete(planned, deep, forward_s, tokens)
            except Exception as error:
                self._fail_poisoned(planned.session, error)
        return forward_s

    def _forward(self, passes: list[Planned]) -> list[torch.Tensor]:
        """Run the layers once; what `_complete` needs of each session's rows."""
        self.pass_began = time.monotonic()
        try:
            segments = [
                Segment(
                    planned.session.sequence,
                    planned.start,
                    self._rows(planned),
                    wanted=any(piece.wanted for piece in planned.pieces),
                    aside=planned.aside,
                )
                for planned in passes
            ]
            # Waits for the device, so that the time is the layers' own.
            return self._outputs(passes, self.runner.run(segments))
        finally:
            self.pass_began = None

    def _fail_poisoned(self, session: Session, error: Exception) -> None:
        """End the session whose Step raised; the others go on. Raises the error where nothing can go on."""
        if is_fatal(error):
            raise error
        log.error("session %s: its Step raised", session.id[:8], exc_info=error)
        text = f"the Step raised {type(error).__name__} in the cloud; see its log"
        self._fail(session, Failed(grpc.StatusCode.INTERNAL, text))

    def _rows(self, planned: Planned) -> torch.Tensor:
        """What goes into the layers, [rows, hidden_size]: all pieces' tokens, then all their alternatives."""
        tokens, aside = [], []
        for piece in planned.pieces:
            assert piece.work.hidden is not None
            tokens.append(piece.work.hidden[piece.first : piece.last])
            if piece.aside:
                aside.append(piece.work.hidden[piece.work.n :])
        return torch.cat(tokens + aside)

    def _outputs(self, passes: list[Planned], deep: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `_complete` needs of the layers' outputs, on the CPU."""
        return [states.to("cpu") for states in deep]

    def _complete(self, planned: Planned, deep: torch.Tensor, forward_s: float, tokens: int) -> None:
        session, row = planned.session, 0
        aside = len(deep) - len(planned.aside)
        for piece in planned.pieces:
            work, count = piece.work, piece.last - piece.first
            work.done = piece.last
            work.compute_s += forward_s
            work.batch_tokens = tokens
            if work.want is Want.ALL:
                work.outputs.append(deep[row : row + count])
                if piece.aside:
                    work.outputs.append(deep[aside : aside + len(piece.aside)])
                    aside += len(piece.aside)
            elif work.want is Want.LAST and not work.left:
                work.outputs.append(deep[row + count - 1 : row + count])
            row += count
            if work.left:
                return
            session.queue.popleft()
            work.waited_s = self._clock() - work.arrived - work.compute_s
            if work.want is not Want.NONE:
                session.answered = self._clock()
            answer = torch.cat(work.outputs) if work.outputs else None
            if answer is not None:
                if not torch.isfinite(answer).all():
                    text = "Step.payload overflows inside the layers: its deep states are not finite"
                    self._fail(session, Failed(grpc.StatusCode.INVALID_ARGUMENT, text))
                    return
                self._metrics.verify_passes.inc()
            self._answer(session, StepDone(work, answer))

    def _answer(self, session: Session, done: StepDone) -> None:
        session.last_active = self._clock()
        self._tell(session, done)

    def _observe(self, passes: list[Planned], forward_s: float, total_s: float) -> None:
        predicted_s = self._pacing.saw_pass(passes, forward_s, total_s)
        self._metrics.saw_cost(predicted_s, self.cost.fit())
        self._metrics.forward_seconds.inc(forward_s)
        self._metrics.engine_seconds.inc(total_s)
        self._metrics.step_seconds.observe(total_s)
        self._metrics.batch_tokens.observe(sum(planned.rows for planned in passes))
        self._metrics.sessions_running.set(len(passes))
        self._metrics.sessions_waiting.set(sum(bool(s.queue) for s in self._sessions.values()))
        for planned in passes:
            is_prompt = self._config.scheduler.is_prompt(planned.pieces[0].work)
            self._metrics.tokens.labels("prefill" if is_prompt else "short").inc(planned.rows)
            self._metrics.saw_rows(planned.session.tenant, planned.rows)
        self._sessions.count_pages()

    def _flush(self) -> None:
        """Hand all events of this round to the event loop at once."""
        if not self._events:
            return
        events, self._events = self._events, []
        try:
            self._loop.call_soon_threadsafe(_deliver, events)
        except RuntimeError:
            log.debug("the event loop is closed; %d events dropped", len(events))


def is_fatal(error: BaseException) -> bool:
    """Whether the accelerator is lost to this process, so that no later pass could succeed either.

    After an error of its own a CUDA context answers every call with an error; too little memory is none of these.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _deliver(events: list[tuple[Callable[[Event], None], Event]]) -> None:
    for deliver, event in events:
        deliver(event)
