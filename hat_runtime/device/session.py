"""The device's end of one session stream: Steps out, Results in, in order, several in flight."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import torch

from hat_runtime.device.refusals import CloudRefused, SessionEnded
from hat_runtime.device.steps import ALL, Binding, Step, StepResult, Want
from hat_runtime.device.token_steps import NO_ROWS, TokenStep, held_after
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HatError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec

if TYPE_CHECKING:
    from hat_runtime.device.link import CloudLink

ALTERNATIVES_SINCE, CLOSE_SINCE = 3, 4
"""Minor protocol versions."""
PARTING_S = 5.0
"""Longest wait for the cloud to end a stream that this device wants no more of."""


class CloudSession:
    """One open session. For the event loop's thread only; `CloudLink.open_session` makes it.

    `committed` never exceeds what the cloud's KV cache holds for the tokens sent last, so a Step may start at any
    position up to it.
    """

    def __init__(self, link: CloudLink, call: grpc.aio.StreamStreamCall[Any, Any], binding: Binding) -> None:
        self.link = link
        self.binding = binding
        self.session_id = ""
        self.limits = pb.Limits()
        self.epoch = 0
        self.committed = 0
        self.evictions = 0
        self.takes_alternatives = False
        """The cloud knows Step.alternatives; it says so before its first Result."""
        self.draining = False
        """The cloud announced that it goes away: open no further request on this session."""
        self.error: HatError | None = None
        """Why the session ended; None while it lives."""
        self.resume_s = 0.0
        """How long the cloud keeps the session after its stream was lost; 0: not at all, or not known yet."""
        self._lost_s = 0.0  # time.monotonic() when it was lost
        self._resumes: CloudSession | None = None
        self._closed = False  # by this device
        self._parting: asyncio.TimerHandle | None = None
        self.uplink_bytes = 0
        self.downlink_bytes = 0
        self._call = call
        self._end = 0
        self._unsent: deque[Step] = deque()
        self._extra: deque[pb.DeviceMessage] = deque()
        self._unanswered: deque[Step] = deque()
        self.on_decoded: Callable[[pb.Decoded], None] | None = None
        """Takes what the cloud decodes by itself (mode picospec)."""
        self.on_evicted: Callable[[], None] | None = None
        """Is told that the cloud gave the KV cache away, also when no Step waits for a Result."""
        self.on_drain: Callable[[], None] | None = None
        """Is told that the replica goes away."""
        self.on_end: Callable[[HatError], None] | None = None
        """Is told why the session ended, also when no Step waits for a Result."""
        self._wake_writer = asyncio.Event()
        self._answered = asyncio.Event()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer = asyncio.create_task(self._write_all())
        self._reader = asyncio.create_task(self._read_all())

    @property
    def unanswered(self) -> int:
        """Steps that wait for their Result."""
        return len(self._unanswered)

    @property
    def alive(self) -> bool:
        """Whether Steps may be submitted."""
        return self.error is None

    @property
    def may_resume(self) -> bool:
        """The stream is lost, but the cloud may still have the session."""
        lost = isinstance(self.error, CloudUnavailable) and not isinstance(
            self.error, SessionEnded | CloudOverloaded
        )
        return (
            lost
            and not self._closed
            and not self.draining
            and time.monotonic() - self._lost_s < self.resume_s
        )

    def open(
        self, message: pb.Open, limits: pb.Limits, timeout_s: float, resumes: CloudSession | None = None
    ) -> None:
        """Queue Open. Steps may follow at once, under the limits that Describe announced: no round trip is lost.

        If the cloud refuses, or does not answer in time, the session ends and `error` says why. A session that
        `resumes` another one may have Steps only after `opened`: before, nobody knows what the cloud holds.
        """
        self.limits, self._resumes = limits, resumes
        self._extra.append(pb.DeviceMessage(open=message))
        self._wake_writer.set()
        timeout = CloudUnavailable(
            f"the cloud at {self.link.address} did not open a session in {timeout_s:g} s"
        )
        timer = asyncio.get_running_loop().call_later(timeout_s, self.close, timeout)
        self._opened.add_done_callback(lambda _: timer.cancel())

    async def opened(self) -> None:
        """Wait for the cloud's Opened. Raises the error with which the session ended instead."""
        await asyncio.shield(self._opened)

    def submit(
        self,
        start: int,
        hidden: torch.Tensor,
        want: Want,
        request_id: str = "",
        *,
        decode: bool = False,
        alternatives: tuple[int, ...] = (),
    ) -> asyncio.Future[StepResult]:
        """Queue one Step and return the future of its Result.

        Args:
            start: position of the first row; below the end of what was sent before, it truncates.
            hidden: shallow states [n, hidden_size], n >= 1.
            want: NONE, LAST or ALL.
            request_id: names the request in the cloud's log; for the first Step of a request.
            decode: the rows are no prompt's, so the binding's decode codec encodes them.
            alternatives: positions for which the last rows are other choices; fewer than n, only with ALL, and only
                if `takes_alternatives`. They bring deep states and leave nothing behind.

        Returns:
            A future. A Step that starts beyond what the cloud holds (it was evicted) is answered stale at once.

        Raises:
            HatError: the session has ended; the error says why.
            ValueError: hidden has a wrong shape or dtype.
        """
        if self.error is not None:
            raise self.error
        if (
            hidden.dtype != self.binding.dtype
            or hidden.shape[1:] != (self.binding.hidden_size,)
            or not len(hidden)
        ):
            raise ValueError(f"shallow states are {hidden.dtype} {list(hidden.shape)}, not {self.binding}")
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if start > self._end:
            future.set_result(StepResult(True, start, len(hidden) - len(alternatives)))
            return future
        step = Step(
            self.epoch,
            start,
            hidden,
            want,
            request_id,
            future,
            alone=not self._unanswered,
            codec=self.binding.encoding(decode),
            decode=decode,
            alternatives=alternatives,
            padding=self.binding.padding,
        )
        self._queue(step)
        return future

    def submit_tokens(
        self, start: int, tokens: pb.TokenStep, want: Want, request_id: str = ""
    ) -> asyncio.Future[StepResult]:
        """Queue one Step of token ids (mode picospec); else as `submit`."""
        if self.error is not None:
            raise self.error
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if start > self._end:
            future.set_result(StepResult(True, start, len(tokens.ids)))
            return future
        alone = not self._unanswered
        self._queue(TokenStep(self.epoch, start, NO_ROWS, want, request_id, future, alone, tokens=tokens))
        return future

    def _queue(self, step: Step) -> None:
        self.committed = min(self.committed, step.start)
        self._end = step.start + step.n
        self._unsent.append(step)
        self._unanswered.append(step)
        self._wake_writer.set()

    def discard(self) -> None:
        """Raise the epoch: Steps under way are of no interest any more, and unsent ones are never sent."""
        for step in self._unanswered:
            step.future.cancel()
        self._drop_unsent()
        self.epoch += 1
        self._end = self.committed

    def rollback(self, position: int) -> None:
        """The tokens from `position` on were wrong: Steps under way are void, and the next one starts there at most."""
        if self._unanswered:
            self.discard()
        self.committed = min(self.committed, position)
        self._end = min(self._end, self.committed)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no Step is unanswered; False if the session ended or the time was up first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._unanswered and self.alive:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            return False
        if self.alive:
            self._end = self.committed
        return self.alive

    def send_telemetry(self, telemetry: pb.Telemetry) -> None:
        """Queue a Telemetry message; nobody answers it."""
        self._extra.append(pb.DeviceMessage(telemetry=telemetry))
        self._wake_writer.set()

    def close(self, error: HatError | None = None) -> None:
        """End the session; the cloud frees what it held. Futures that wait get the error.

        A stream that just ended would be one that was lost, so the cloud is told, and ends it. Nobody waits for that. A
        resume that is not answered yet just ends: the session is there for the next one.
        """
        if self.error is not None:
            return
        self._closed = True
        told = self.link.cloud_minor >= CLOSE_SINCE or self.resume_s > 0
        told = told and (self._resumes is None or self._opened.done())
        self._end_with(error or CloudUnavailable("the session was closed by this device"), parting=told)
        if not told:
            self._reader.cancel()
            self._call.cancel()
            return
        self._extra.clear()
        self._extra.append(pb.DeviceMessage(close=pb.Close()))
        self._wake_writer.set()
        self.link.part(self)
        self._parting = asyncio.get_running_loop().call_later(PARTING_S, self._call.cancel)

    def when_over(self, then: Callable[[], None]) -> None:
        """Have `then` called when nothing is read from the stream any more."""
        self._reader.add_done_callback(lambda _: then())

    async def parted(self) -> None:
        """Wait until the stream of a session that was closed is over."""
        await asyncio.wait((self._reader,))

    # Writing

    async def _write_all(self) -> None:
        # A task of its own, because cancelling a write of grpc.aio cancels the whole stream.
        try:
            await self._call.wait_for_connection()
            while True:
                while self._extra or self._unsent:
                    if self._extra:
                        await self._write(self._extra.popleft())
                        continue
                    for message in self._unsent.popleft().messages(self.limits.max_frame_bytes):
                        await self._write(message)
                        if self.error is not None:
                            break
                self._wake_writer.clear()
                await self._wake_writer.wait()
        except (grpc.aio.AioRpcError, grpc.aio.InternalError):
            pass  # the stream has ended: the reader knows why

    async def _write(self, message: pb.DeviceMessage) -> None:
        data = message.SerializeToString()
        self.uplink_bytes += len(data)
        self.link.metrics.uplink_bytes.inc(len(data))
        # Not call.write(): if the cloud ends the stream meanwhile, that replaces the cloud's status by INTERNAL, and
        # nobody learns that it was full or whether to come back.
        await self._call._cython_call.send_serialized_message(data)  # type: ignore[attr-defined]

    # Reading

    async def _read_all(self) -> None:
        try:
            while True:
                message: Any = await self._call.read()
                if message is grpc.aio.EOF:
                    break
                size = message.ByteSize()
                self.downlink_bytes += size
                self.link.metrics.downlink_bytes.inc(size)
                try:
                    self._receive(message)
                except CloudRefused as error:
                    self.close(error)  # and read on to the end of the stream
            self._end_with(CloudUnavailable(f"the cloud at {self.link.address} closed the session"))
        except grpc.aio.AioRpcError as error:
            self._end_with(self.link.explain(error))
        finally:
            # grpc.aio raises CancelledError also for a stream that the other side cancelled.
            self._end_with(CloudUnavailable(f"the cloud at {self.link.address} cancelled the session"))
            self._writer.cancel()
            if self._parting is not None:
                self._parting.cancel()
            self.link.parted(self)

    def _receive(self, message: pb.CloudMessage) -> None:
        if self.error is not None:
            return  # closed; what the cloud had under way is of no interest
        kind = message.WhichOneof("message")
        if kind == "result":
            self._receive_result(message.result)
        elif kind == "notice":
            self._receive_notice(message.notice)
        elif kind == "opened":
            opened = message.opened
            self.session_id = opened.session_id
            self.limits = opened.limits
            self.link.cloud_cost = opened.cost
            self.takes_alternatives = opened.protocol_minor >= ALTERNATIVES_SINCE
            self.resume_s = opened.resume_ms / 1000
            if self._resumes is not None:
                # Neither more than the cloud has, nor more than is sure to be what was sent last.
                self.committed = self._end = min(opened.committed, self._resumes.committed)
            if not self._opened.done():
                self._opened.set_result(None)

    def _receive_result(self, result: pb.Result) -> None:
        if not self._unanswered:
            raise CloudRefused(f"the cloud at {self.link.address} sent a Result that no Step asked for")
        step = self._unanswered[0]
        if (result.epoch, result.start_pos, result.n) != (step.epoch, step.start, step.n):
            raise CloudRefused(
                f"the cloud at {self.link.address} answered epoch {result.epoch}, start_pos {result.start_pos}, "
                f"n {result.n}, but the oldest Step is epoch {step.epoch}, start_pos {step.start}, n {step.n}"
            )
        if result.more or step.received:
            step.received += result.payload
            if result.more:
                return
        payload = step.received or result.payload
        self._unanswered.popleft()
        self._answered.set()
        queue_s, compute_s = result.queue_us / 1e6, result.compute_us / 1e6
        stale = result.status == pb.STATUS_STALE
        deep = None
        if not stale:
            # A later Step may start lower already, and truncates when its turn comes.
            end = min([held_after(step, result), *(later.start for later in self._unanswered)])
            # What an older epoch has put into the cloud's cache may be tokens that were wrong.
            self.committed = end if step.epoch == self.epoch else min(end, self.committed)
            rows = step.rows_wanted
            try:
                if rows:
                    deep = codec.decode(payload, rows, self.binding.hidden_size, self.binding.dtype)
            except ValueError as error:
                raise CloudRefused(f"the cloud at {self.link.address} sent a bad Result: {error}") from error
            company = max(0, result.batch_tokens - step.n - len(step.alternatives))
            self.link.saw_result(
                step.sent_bytes,
                step.submitted_s,
                queue_s,
                compute_s,
                company,
                alone=step.alone,
                chunk=step.want != ALL,
            )
            self.link.suggested_chunk = result.suggested_chunk
            if result.HasField("cost"):
                self.link.cloud_cost = result.cost
        if not step.future.done():
            tokens, proposed = result.batch_tokens, result.suggested_chunk
            verdict = result.verdict if result.HasField("verdict") else None
            step.future.set_result(
                StepResult(stale, step.start, step.n, deep, queue_s, compute_s, tokens, proposed, verdict)
            )

    def _receive_notice(self, notice: pb.Notice) -> None:
        kind = notice.WhichOneof("notice")
        if kind == "evicted":
            self.evictions += 1
            self.link.metrics.evictions.inc()
            self.committed = min(self.committed, notice.evicted.committed)
            self._drop_unsent()
            self.epoch += 1
            self._end = self.committed
            if self.on_evicted is not None:
                self.on_evicted()
        elif kind == "drain":
            self.draining = True
            if self.on_drain is not None:
                self.on_drain()
        elif kind == "decoded" and self.on_decoded is not None:
            self.on_decoded(notice.decoded)
        elif kind == "retry":
            self.link.retry_at_s = time.monotonic() + notice.retry.after_ms / 1000

    def _drop_unsent(self) -> None:
        """Answer the Steps that were not sent as stale; they are the last of the unanswered ones."""
        for _ in range(len(self._unsent)):
            step = self._unsent.pop()
            last = self._unanswered.pop()
            assert last is step
            if not step.future.done():
                step.future.set_result(StepResult(True, step.start, step.n))
        self._answered.set()

    def _end_with(self, error: HatError, *, parting: bool = False) -> None:
        if self.error is not None:
            return
        self.error, self._lost_s = error, time.monotonic()
        self._unsent.clear()
        waiting: list[asyncio.Future[Any]] = [self._opened, *(step.future for step in self._unanswered)]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits gets it; nobody waiting is no mistake
        self._unanswered.clear()
        self._answered.set()
        if not parting:
            self._writer.cancel()
        self.link.forget(self)
        if self.on_end is not None:
            self.on_end(error)
