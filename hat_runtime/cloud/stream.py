"""One stream of the session protocol on the event loop."""

from __future__ import annotations

import asyncio

import grpc

from hat_runtime.cloud.admission import Place
from hat_runtime.cloud.peer import Peer
from hat_runtime.cloud.session import Event, Failed, StepDone
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec

PARTING_S = 10.0
"""Longest wait for a device to read what is before the status that ends its stream."""


class Stream:
    """One session's stream on the event loop: answers waiting to be written, Steps waiting to be answered.

    Made in the task that writes to it. What waits to be written is bounded by what `admit` lets in: nothing comes of a
    Step before it was let in, and it leaves room for another only when its answer was written.
    """

    def __init__(self, limits: pb.Limits) -> None:
        self.events: asyncio.Queue[Event | pb.CloudMessage | None] = asyncio.Queue()
        self.peer = Peer()
        """Who is at the other end."""
        self.place: Place | None = None
        """Its session's place in the cloud; None before it has one, and when another stream has it."""
        self.codecs = codec.RAW_ONLY
        """How its Steps are encoded."""
        self.pad_rows = 0
        """As Open.pad_results."""
        self.resumable = False
        """The session outlives it, unless the device says Close."""
        self.closed = False
        """The device has said Close."""
        self.fenced = False
        """Another stream has its session."""
        self.failed = False
        """The cloud has ended it, though its device may not have read that."""
        self._limits = limits
        self._writer = asyncio.current_task()
        self._parting: asyncio.TimerHandle | None = None
        self._steps = 0
        self._tokens = 0
        self._room = asyncio.Event()
        self._half_closed = False

    def deliver(self, event: Event | pb.CloudMessage) -> None:
        """Queue what is to be written. A device that does not read even the end of its stream is left."""
        self.events.put_nowait(event)
        if isinstance(event, Failed):
            self.failed = True
        if self.failed and self._parting is None and self._writer is not None:
            self._parting = asyncio.get_running_loop().call_later(PARTING_S, self._writer.cancel)

    def fence(self) -> Place | None:
        """Another stream has the session and its place from now on: this one may not write any more, and ends."""
        self.fenced = True
        place, self.place = self.place, None
        self.deliver(Failed(grpc.StatusCode.ABORTED, "another stream has resumed this session"))
        return place

    def close(self) -> None:
        """The device wants no more of the session."""
        self.closed = True
        self.events.put_nowait(None)

    def ended(self) -> None:
        """Its writer is done."""
        if self._parting is not None:
            self._parting.cancel()

    async def admit(self, tokens: int) -> None:
        """Wait until one more Step of `tokens` may be queued. Meanwhile nothing is read, so gRPC slows the device."""
        while self._steps and (
            self._steps >= self._limits.max_inflight_steps
            or self._tokens + tokens > 2 * self._limits.max_step_tokens
        ):
            self._room.clear()
            await self._room.wait()
        self._steps += 1
        self._tokens += tokens

    @property
    def alone(self) -> bool:
        """Whether only one Step is unanswered."""
        return self._steps == 1

    def answered(self, done: StepDone) -> None:
        """A Step's answer was written."""
        self._steps -= 1
        self._tokens -= done.work.n
        self._room.set()
        self._end_if_finished()

    def half_close(self) -> None:
        """The device sends no more; the stream ends with its last answer."""
        self._half_closed = True
        self._end_if_finished()

    def _end_if_finished(self) -> None:
        if self._half_closed and not self._steps:
            self.events.put_nowait(None)
