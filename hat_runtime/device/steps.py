"""Steps and their Results, as the device sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import frames
from hat_runtime.wire.codec import RAW, RowCodec, codec_named
from hat_runtime.wire.padding import Padding, fill, frame_bytes, split_padded

Want: TypeAlias = "pb.Want.ValueType"
NONE, LAST, ALL = pb.WANT_NONE, pb.WANT_LAST, pb.WANT_ALL


@dataclass(frozen=True)
class Binding:
    """What device and cloud must have in common, as the device knows it from its own model folder."""

    model_revision: str
    layers: LayerRange
    """The cloud's layers."""
    dtype: torch.dtype
    hidden_size: int
    codec: str = RAW
    """Of the rows of a prompt."""
    decode_codec: str = RAW
    """Of all other rows."""

    mode: str = ""
    """As DescribeReply.mode; "" is hat."""
    padding: Padding | None = None
    """Frames have fixed sizes, of these many rows."""

    @property
    def one_codec(self) -> bool:
        """Whether all rows are encoded alike."""
        return self.codec == self.decode_codec

    @property
    def prompt_row_bytes(self) -> int:
        """Bytes of a prompt's row on the wire; 0 in token mode, where no rows travel."""
        return 0 if self.mode else self.encoding(False).row_bytes(self.hidden_size, self.dtype)

    def encoding(self, decode: bool) -> RowCodec:
        """The codec of a prompt's rows or of all others. Raises ValueError if it has no such codec."""
        return codec_named(self.decode_codec if decode else self.codec)


@dataclass(frozen=True)
class StepResult:
    """The cloud's answer to one Step."""

    stale: bool
    """True: not computed, because the epoch was raised or the session evicted."""
    start: int
    n: int
    deep: torch.Tensor | None = None
    """[1, hidden_size] for LAST, [n + alternatives, hidden_size] for ALL, None for NONE or a stale Step."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    batch_tokens: int = 0
    suggested_chunk: int = 0
    verdict: pb.Verdict | None = None
    """Token mode, want LAST."""


@dataclass(eq=False)
class Step:
    """A Step that was submitted and not answered yet."""

    epoch: int
    start: int
    hidden: torch.Tensor
    want: Want
    request_id: str
    future: asyncio.Future[StepResult]
    alone: bool
    """No other Step of the session was unanswered when this one was submitted."""
    codec: RowCodec = field(default_factory=lambda: codec_named(RAW))
    decode: bool = False
    """The codec is that of rows that are no prompt's."""
    alternatives: tuple[int, ...] = ()
    """Positions of the last rows, which are other choices for these positions (runtime.proto)."""
    padding: Padding | None = None
    """Its frames are filled up to this."""
    submitted_s: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)

    @property
    def n(self) -> int:
        """Tokens in the Step."""
        return len(self.hidden) - len(self.alternatives)

    @property
    def sent_bytes(self) -> int:
        """Bytes of what it carries on the wire, for the estimate of the link's rate."""
        rows, hidden_size = self.hidden.shape
        if self.padding is not None:
            rows = self.padding.rows(rows, self.want == ALL)
        return rows * self.codec.row_bytes(hidden_size, self.hidden.dtype)

    @property
    def rows_wanted(self) -> int:
        """Deep states that its Result brings."""
        return {NONE: 0, LAST: 1, ALL: len(self.hidden)}[self.want]

    def messages(self, max_frame_bytes: int) -> Iterator[pb.DeviceMessage]:
        """The Step's frames; 0 stands for the protocol's own limit."""
        payload = self.codec.encode(self.hidden)
        longest = max_frame_bytes or frames.MAX_FRAME_BYTES
        if self.padding is None:
            for part, more in frames.split(payload, longest):
                yield pb.DeviceMessage(step=self._frame(part, more))
            return
        others = self.padding.rows(len(self.hidden), True) if self.want == ALL else 0
        for part, more, seen in split_padded(payload, self.sent_bytes, longest):
            frame = self._frame(part, more)
            fill(frame, frame_bytes(seen, others))
            yield pb.DeviceMessage(step=frame)

    def _frame(self, part: bytes, more: bool) -> pb.Step:
        return pb.Step(
            epoch=self.epoch,
            start_pos=self.start,
            n=self.n,
            want=self.want,
            payload=part,
            more=more,
            request_id=self.request_id,
            decode=self.decode,
            alternatives=self.alternatives,
        )
