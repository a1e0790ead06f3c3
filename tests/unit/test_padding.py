"""Frames of fixed sizes."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.cloud.assembly import ProtocolError, StepAssembler, check_padding, result_frames
from hat_runtime.cloud.session import StepDone, StepWork, Want
from hat_runtime.device.policy import DraftConfig, most_round_rows
from hat_runtime.device.steps import ALL, LAST, NONE, Step, StepResult
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire.codec import RAW_ONLY
from hat_runtime.wire.padding import MAX_PADDING_BYTES, Padding, fill, padded_rows, split_padded

WIDTH = 8
LIMITS = pb.Limits(max_step_tokens=64, max_frame_bytes=300)


def step(rows: int, want: int, padding: Padding | None, **fields: object) -> Step:
    loop = asyncio.new_event_loop()
    future: asyncio.Future[StepResult] = loop.create_future()
    loop.close()
    aside = fields.pop("alternatives", ())
    hidden = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    values = {"epoch": 0, "start": 0, "request_id": "", "alone": True} | fields
    return Step(hidden=hidden, want=want, future=future, alternatives=aside, padding=padding, **values)  # type: ignore[arg-type]


@given(st.integers(0, 40_000), st.integers(0, 300), st.integers(0, 2**31))
def test_a_frame_is_filled_up_to_its_size_or_one_byte_less(size: int, payload: int, epoch: int) -> None:
    frame = pb.Step(epoch=epoch, payload=bytes(payload))
    before = frame.ByteSize()
    fill(frame, size)
    if size > before + 2:  # the field's tag, its length, and a byte
        assert size - 1 <= frame.ByteSize() <= size
    else:
        assert frame.ByteSize() == before


@given(st.binary(max_size=100), st.integers(1, 120), st.integers(1, 40))
def test_the_parts_of_a_payload_are_as_many_as_of_a_full_one(
    payload: bytes, whole: int, longest: int
) -> None:
    whole = max(whole, len(payload))
    parts = list(split_padded(payload, whole, longest))
    assert b"".join(part for part, _, _ in parts) == payload
    assert [more for _, more, _ in parts] == [True] * (len(parts) - 1) + [False]
    assert sum(seen for _, _, seen in parts) == whole
    assert max(seen for _, _, seen in parts) <= longest


@pytest.mark.parametrize(("rows", "unit", "padded"), [(0, 4, 4), (1, 4, 4), (4, 4, 4), (5, 4, 8), (3, 1, 3)])
def test_rows_are_rounded_up(rows: int, unit: int, padded: int) -> None:
    assert padded_rows(rows, unit) == padded


@pytest.mark.parametrize("want", [NONE, LAST, ALL])
def test_steps_of_any_rows_look_alike_and_are_read_as_they_are(want: int) -> None:
    padding = Padding(round_rows=24, prompt_rows=24)
    seen = set()
    for rows, start, epoch, name in ((1, 0, 0, ""), (6, 200, 3, "r" * 64), (24, 100_000, 9000, "")):
        assembler = StepAssembler(WIDTH, torch.float32, LIMITS, RAW_ONLY)
        aside = (start + 1,) * (rows // 3) if want == ALL else ()
        sent = step(rows, want, padding, start=start, epoch=epoch, request_id=name, alternatives=aside)
        messages = list(sent.messages(LIMITS.max_frame_bytes))
        seen.add(tuple(message.ByteSize() for message in messages))
        *before, work = [assembler.feed(message.step) for message in messages]
        assert before == [None] * (len(messages) - 1)
        assert work is not None
        assert work.hidden is not None
        assert torch.equal(work.hidden, sent.hidden)
        assert (work.start_pos, work.n, work.alternatives) == (start, sent.n, aside)
    assert len(seen) == 1
    (sizes,) = seen
    assert len(sizes) == 3, "24 rows of 32 bytes in frames of 300"
    # Without padding they do not look alike, so that this test can fail.
    assert len({sum(m.ByteSize() for m in step(rows, want, None).messages(300)) for rows in (1, 6)}) == 2


def test_results_look_alike_stale_ones_too() -> None:
    seen = set()
    for rows, stale in ((1, False), (5, False), (6, True)):
        hidden = torch.randn(rows, WIDTH)
        work = StepWork(rows, 10**rows, Want.ALL, hidden, 0.0, compute_s=rows / 3, batch_tokens=rows)
        done = StepDone(work, None if stale else hidden, stale)
        messages = list(result_frames(done, pad_rows=6))
        assert b"".join(message.result.payload for message in messages) == (
            b"" if stale else hidden.numpy().tobytes()
        )
        seen.add(tuple(message.ByteSize() for message in messages))
    assert len(seen) == 1


def test_a_frame_with_nothing_in_it_is_refused_and_so_is_too_much_padding() -> None:
    assembler = StepAssembler(WIDTH, torch.float32, LIMITS, RAW_ONLY)
    empty = pb.Step(n=1, want=LAST, more=True)
    with pytest.raises(ProtocolError, match="empty frame"):
        assembler.feed(empty)
    assembler = StepAssembler(WIDTH, torch.float32, LIMITS, RAW_ONLY)
    with pytest.raises(ProtocolError, match=f"at most {MAX_PADDING_BYTES}"):
        assembler.feed(pb.Step(n=1, want=LAST, more=True, padding=bytes(MAX_PADDING_BYTES + 1)))


@pytest.mark.parametrize(
    ("rows", "mode", "text"), [(65, "", "65 is more than 64"), (1, "picospec", "mode picospec has no rows")]
)
def test_padding_that_there_cannot_be_is_refused(rows: int, mode: str, text: str) -> None:
    with pytest.raises(ProtocolError, match=text) as caught:
        check_padding(pb.Open(pad_results=rows), LIMITS, mode)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    check_padding(pb.Open(pad_results=0), LIMITS, mode)


@pytest.mark.parametrize(("round_rows", "prompt_rows"), [(0, 1), (1, 0)])
def test_padding_to_no_rows_is_an_error(round_rows: int, prompt_rows: int) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        Padding(round_rows, prompt_rows)


def test_a_full_round_has_its_drafts_and_all_their_alternatives() -> None:
    assert most_round_rows(DraftConfig(max_draft=6, alternatives=0)) == 7
    assert most_round_rows(DraftConfig(max_draft=2, alternatives=3)) == 9
    assert most_round_rows(DraftConfig()) == 6 + 1 + 6 * 3
