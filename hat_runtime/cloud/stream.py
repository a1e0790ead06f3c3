"""One stream of the session protocol on the event loop."""

from __future__ import annotations

import asyncio

from hat_runtime.cloud.peer import Peer
from hat_runtime.cloud.session import Event, StepDone
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec


class Stream:
    """One session's stream on the event loop: answers waiting to be written, Steps waiting to be answered."""

    def __init__(self, limits: pb.Limits) -> None:
        self.events: asyncio.Queue[Event | pb.CloudMessage | None] = asyncio.Queue()
        self.peer = Peer()
        """Who is at the other end."""
        self.codecs = codec.RAW_ONLY
        """How its Steps are encoded."""
        self._limits = limits
        self._steps = 0
        self._tokens = 0
        self._room = asyncio.Event()
        self._half_closed = False

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
