"""The device's submodels on their worker thread, without a cloud."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hat_runtime.device.chain import NO_DRAFTS, Speculation
from hat_runtime.device.drafting.base import DraftState
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.submodels import DeviceFull, DeviceModel
from hat_runtime.model.pages import PagedSequence

IDS = [5 + 11 * i % 190 for i in range(60)]


@pytest.fixture
async def model(tiny_llama: Path) -> AsyncIterator[DeviceModel]:
    model = DeviceModel.load(tiny_llama, 2, torch.float32, kv_tokens=128, page_tokens=16)
    yield model
    await model.close()


async def accounted_for(model: DeviceModel, *sequences: PagedSequence) -> None:
    await model.call(lambda: model.cache.check(sequences))


async def test_any_chunks_and_any_company_give_the_same_states(model: DeviceModel) -> None:
    whole, chunked, other = PagedSequence(), PagedSequence(), PagedSequence()
    want = await model.shallow(whole, IDS[:40], 0)
    parts = []
    for start in range(0, 40, 7):
        part, _ = await asyncio.gather(
            model.shallow(chunked, IDS[start : min(start + 7, 40)], start), model.shallow(other, IDS[:5], 0)
        )
        parts.append(part)
    assert torch.allclose(torch.cat(parts), want, atol=1e-3)
    assert chunked.length == 40
    await accounted_for(model, whole, chunked, other)


def speculation(tokens: list[int], sequence: PagedSequence, **fields: Any) -> Speculation:
    """An answer whose tokens are all in the device's cache."""
    return Speculation(
        sequence, DraftState(), SamplingParams(), tokens=list(tokens), cached=len(tokens), **fields
    )


async def test_a_turn_is_head_sampling_and_the_next_shallow_pass(model: DeviceModel) -> None:
    sequence, again = PagedSequence(), PagedSequence()
    deep = torch.randn(1, 64)
    await model.shallow(sequence, IDS[:10], 0)
    answer = speculation(IDS[:10], sequence)
    turn = await model.turn(answer, deep, NO_DRAFTS, most=5)
    want = await model.shallow(again, [*IDS[:10], *turn.tokens], 0)
    assert answer.tokens == [*IDS[:10], *turn.tokens]
    assert torch.allclose(torch.cat(answer.hidden), want[-1:], atol=1e-3)

    stopping = speculation(answer.tokens, sequence, stop_ids=frozenset(turn.tokens))
    stopped = await model.turn(stopping, deep, NO_DRAFTS, most=5)
    assert stopped.tokens == turn.tokens
    assert stopping.hidden == []
    last = speculation(answer.tokens, sequence)
    await model.turn(last, deep, NO_DRAFTS, most=1)
    assert last.hidden == []
    assert sequence.length == 11


async def test_rounds_of_one_cloud_pass_are_gathered(model: DeviceModel) -> None:
    """Four deep states that arrive one by one: nobody waits for a fifth, and every session gets its own token."""
    sequences = [PagedSequence() for _ in range(4)]
    deeps = torch.randn(4, 64)
    want = []
    for sequence, deep in zip(sequences, deeps, strict=True):
        await model.shallow(sequence, IDS[:8], 0)
        alone = PagedSequence()
        await model.shallow(alone, IDS[:8], 0)
        want.append((await model.turn(speculation(IDS[:8], alone), deep[None], NO_DRAFTS, most=5)).tokens)
        model.release(alone)
    model.rounds_in_flight = 4

    async def arrive(index: int) -> list[int]:
        await asyncio.sleep(index * 1e-4)
        model.rounds_in_flight -= 1
        answer = speculation(IDS[:8], sequences[index])
        return (await model.turn(answer, deeps[index : index + 1], NO_DRAFTS, most=5, batch_tokens=5)).tokens

    assert await asyncio.gather(*(arrive(index) for index in range(4))) == want


async def test_only_the_session_without_pages_fails(model: DeviceModel) -> None:
    small, large = PagedSequence(), PagedSequence()
    results = await asyncio.gather(
        model.shallow(small, IDS[:30], 0), model.shallow(large, IDS * 3, 0), return_exceptions=True
    )
    assert isinstance(results[0], torch.Tensor)
    assert isinstance(results[1], DeviceFull)
    await accounted_for(model, small, large)
    model.release(small)
    assert len(await model.shallow(large, IDS * 2, 0)) == 120
    await accounted_for(model, large)


async def test_a_wrong_start_fails_alone_and_the_worker_lives(model: DeviceModel) -> None:
    sequence = PagedSequence()
    with pytest.raises(ValueError, match="starts at 5"):
        await model.shallow(sequence, IDS[:3], 5)
    assert len(await model.shallow(sequence, IDS[:3], 0)) == 3


async def test_cancelled_jobs_are_skipped_and_released_in_order(model: DeviceModel) -> None:
    sequences = [PagedSequence() for _ in range(6)]
    # A page each: all six fit, for the worker may have begun before they are cancelled.
    tasks = [asyncio.create_task(model.shallow(sequence, IDS[:16], 0)) for sequence in sequences]
    await asyncio.sleep(0)
    for task, sequence in zip(tasks[::2], sequences[::2], strict=True):
        task.cancel()
        model.release(sequence)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, torch.Tensor) for result in results] == [False, True] * 3
    await accounted_for(model, *sequences[1::2])
    assert [sequence.pages for sequence in sequences[::2]] == [[]] * 3
