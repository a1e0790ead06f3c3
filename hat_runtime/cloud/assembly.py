"""Frames of a Step -> one StepWork, and one StepDone -> frames of a Result, with every check that needs no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import grpc
import torch

from hat_runtime.cloud.session import StepDone, StepWork, Want
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec, frames
from hat_runtime.wire.padding import MAX_PADDING_BYTES, fill, frame_bytes, padded_rows, split_padded

MOST_ALTERNATIVES = 8
"""For each token of a Step: they go with its tokens, and no pass is divided for them."""

LONGEST_TEXT = 500
"""Characters of what a device is told about its mistake."""

LAST_EPOCH = (1 << 32) - 2
"""Of a Step: a cloud that refuses a draft begins the next one."""

_WANTS = {pb.WANT_NONE: Want.NONE, pb.WANT_LAST: Want.LAST, pb.WANT_ALL: Want.ALL}


class ProtocolError(Exception):
    """The device broke the protocol: its stream ends with this status."""

    def __init__(
        self,
        text: str,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        retry_after_s: float | None = None,
    ) -> None:
        # Much of it may be the device's own words, which go into a log line and a header of the reply.
        super().__init__(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...")
        self.code = code
        self.retry_after_s = retry_after_s


def check_step(step: pb.Step, wants: Mapping[pb.Want.ValueType, Want], limits: pb.Limits) -> None:
    """What holds for a Step in every mode.

    Args:
        step: its first frame.
        wants: those that the mode has, in the protocol's order.
        limits: that devices are told.

    Raises:
        ProtocolError: names the field that is wrong, and its value.
    """
    if step.want not in wants:
        names = ", ".join(want.name for want in wants.values())
        raise ProtocolError(f"Step.want={step.want} is none of {names}")
    if step.epoch > LAST_EPOCH:
        raise ProtocolError(f"Step.epoch={step.epoch} is more than {LAST_EPOCH}")
    if not 1 <= step.n <= limits.max_step_tokens:
        raise ProtocolError(f"Step.n={step.n} is not 1 to {limits.max_step_tokens}")


class StepAssembler:
    """Collects the frames of one Step after another. Holds at most one Step's payload."""

    def __init__(
        self, hidden_size: int, dtype: torch.dtype, limits: pb.Limits, codecs: codec.CodecChoice
    ) -> None:
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._limits = limits
        self._codecs = {
            decode: codec.codec_named(name)
            for decode, name in ((False, codecs.prompt), (True, codecs.decode))
        }
        self._header: tuple[int, int, int, int, bool, tuple[int, ...]] | None = None
        self._payload = bytearray()

    def feed(self, step: pb.Step) -> StepWork | None:
        """Take one frame; the Step if it was its last.

        Raises:
            ProtocolError: a size, a count or `want` is wrong, the frame does not belong to the Step begun, or the
                payload is none of the codec's.
        """
        aside = tuple(step.alternatives)
        header = (step.epoch, step.start_pos, step.n, step.want, step.decode, aside)
        if self._header is None:
            self._check_header(step)
            self._header = header
        elif header != self._header:
            raise ProtocolError(
                f"frame (epoch, start_pos, n, want, decode, alternatives)={header} continues a Step of "
                f"{self._header}"
            )
        if len(step.payload) > self._limits.max_frame_bytes:
            raise ProtocolError(
                f"Step.payload has {len(step.payload)} bytes; a frame holds at most {self._limits.max_frame_bytes}"
            )
        if len(step.padding) > MAX_PADDING_BYTES:
            raise ProtocolError(
                f"Step.padding has {len(step.padding)} bytes; a frame holds at most {MAX_PADDING_BYTES}"
            )
        if step.more and not step.payload and not step.padding:
            raise ProtocolError("an empty frame says that more follow")
        rows, count = self._codecs[step.decode], step.n + len(aside)
        whole = count * rows.row_bytes(self._hidden_size, self._dtype)
        if len(self._payload) + len(step.payload) > whole or (
            not step.more and len(self._payload) + len(step.payload) != whole
        ):
            raise ProtocolError(
                f"Step.payload has {len(self._payload) + len(step.payload)} bytes, but "
                f"{rows.describe(count, self._hidden_size, self._dtype)} are {whole} bytes"
            )
        self._payload += step.payload
        if step.more:
            return None
        payload, self._payload, self._header = self._payload, bytearray(), None
        try:
            hidden = rows.decode(payload, count, self._hidden_size, self._dtype)
        except ValueError as error:
            raise ProtocolError(f"Step.payload: {error}") from error
        want = _WANTS[step.want]
        return StepWork(step.epoch, step.start_pos, want, hidden, time.monotonic(), alternatives=aside)

    def _check_header(self, step: pb.Step) -> None:
        check_step(step, _WANTS, self._limits)
        aside = step.alternatives
        if not aside:
            return
        if step.want != pb.WANT_ALL:
            raise ProtocolError("Step.want must be ALL where Step.alternatives is not empty")
        if step.n + len(aside) > self._limits.max_step_tokens:
            raise ProtocolError(
                f"Step.n={step.n} and {len(aside)} alternatives are more than {self._limits.max_step_tokens} rows"
            )
        if len(aside) > MOST_ALTERNATIVES * step.n:
            raise ProtocolError(
                f"Step.alternatives holds {len(aside)} positions; "
                f"at most {MOST_ALTERNATIVES} for each of n={step.n} tokens"
            )
        for position in aside:
            if not step.start_pos <= position <= step.start_pos + step.n:
                raise ProtocolError(
                    f"Step.alternatives holds {position}, which is not {step.start_pos} to {step.start_pos + step.n}"
                )


def cost_hints(cost: PassCost | None, prompt_rows: int) -> pb.CostHints:
    """What passes cost lately, empty while that is not known; `prompt_rows` are the most of prompts in one pass."""
    if cost is None:
        return pb.CostHints()
    return pb.CostHints(
        fixed_s=cost.fixed_s,
        per_token_s=cost.per_token_s,
        per_pair_s=cost.per_pair_s,
        per_cached_s=cost.per_cached_s,
        prompt_rows=prompt_rows,
    )


def result_frames(
    done: StepDone,
    verdict: pb.Verdict | None = None,
    cost: pb.CostHints | None = None,
    suggested_chunk: int = 0,
    pad_rows: int = 0,
) -> Iterator[pb.CloudMessage]:
    """The frames that answer one Step.

    Args:
        done: the answer.
        verdict: of token mode.
        cost: with the last Step of a prompt.
        suggested_chunk: tokens that are proposed for the chunks of prompts; 0: nothing.
        pad_rows: as Open.pad_results.
    """
    work = done.work
    payload = b"" if done.deep is None else codec.encode(done.deep)

    def frame(part: bytes, more: bool) -> pb.Result:
        return pb.Result(
            status=pb.STATUS_STALE if done.stale else pb.STATUS_OK,
            epoch=work.epoch,
            start_pos=work.start_pos,
            n=work.n,
            payload=part,
            more=more,
            queue_us=_micros(work.waited_s),
            compute_us=_micros(work.compute_s),
            batch_tokens=work.batch_tokens,
            suggested_chunk=suggested_chunk,
            verdict=verdict,
            cost=cost,
        )

    if not pad_rows or work.hidden is None:
        for part, more in frames.split(payload):
            yield pb.CloudMessage(result=frame(part, more))
        return
    rows, hidden_size = work.hidden.shape
    # A stale Step's as well: that a round was refused is nobody's business.
    seen_rows = padded_rows(rows, pad_rows) if work.want is Want.ALL else 1
    whole = seen_rows * codec.row_bytes(hidden_size, work.hidden.dtype)
    for part, more, seen in split_padded(payload, whole, frames.MAX_FRAME_BYTES):
        result = frame(part, more)
        fill(result, frame_bytes(seen))
        yield pb.CloudMessage(result=result)


def check_padding(opening: pb.Open, limits: pb.Limits, mode: str) -> None:
    """Refuse padding of Results that there cannot be.

    Raises:
        ProtocolError: Open.pad_results is too large, or the mode has no hidden states.
    """
    if opening.pad_results > limits.max_step_tokens:
        raise ProtocolError(f"Open.pad_results={opening.pad_results} is more than {limits.max_step_tokens}")
    if opening.pad_results and mode:
        raise ProtocolError(f"Open.pad_results={opening.pad_results}: mode {mode} has no rows to pad")


def _micros(seconds: float) -> int:
    return max(0, min(2**32 - 1, round(seconds * 1e6)))
