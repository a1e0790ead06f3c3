"""The device's submodels on their worker thread, without a cloud."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

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


async def test_advance_is_head_sampling_and_the_next_shallow_pass(model: DeviceModel) -> None:
    sequence, again = PagedSequence(), PagedSequence()
    deep = torch.randn(1, 64)
    await model.shallow(sequence, IDS[:10], 0)
    advanced = await model.advance(sequence, deep, SamplingParams(), 10)
    assert advanced.hidden is not None
    want = await model.shallow(again, [*IDS[:10], advanced.token_id], 0)
    assert torch.allclose(advanced.hidden, want[-1:], atol=1e-3)

    stopped = await model.advance(sequence, deep, SamplingParams(), 11, frozenset({advanced.token_id}))
    assert (stopped.token_id, stopped.hidden) == (advanced.token_id, None)
    last = await model.advance(sequence, deep, SamplingParams(), 11, embed_new=False)
    assert last.hidden is None
    assert sequence.length == 11


async def test_rounds_of_one_cloud_pass_are_gathered(model: DeviceModel) -> None:
    """Four deep states that arrive one by one: nobody waits for a fifth, and every session gets its own token."""
    sequences = [PagedSequence() for _ in range(4)]
    deeps = torch.randn(4, 64)
    want = []
    for sequence, deep in zip(sequences, deeps, strict=True):
        await model.shallow(sequence, IDS[:8], 0)
        want.append((await model.advance(PagedSequence(), deep[None], SamplingParams(), 0)).token_id)
    model.rounds_in_flight = 4

    async def arrive(index: int) -> int:
        await asyncio.sleep(index * 1e-4)
        model.rounds_in_flight -= 1
        deep = deeps[index : index + 1]
        return (await model.advance(sequences[index], deep, SamplingParams(), 8, batch_tokens=5)).token_id

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
    tasks = [asyncio.create_task(model.shallow(sequence, IDS[:20], 0)) for sequence in sequences]
    await asyncio.sleep(0)
    for task, sequence in zip(tasks[::2], sequences[::2], strict=True):
        task.cancel()
        model.release(sequence)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, torch.Tensor) for result in results] == [False, True] * 3
    await accounted_for(model, *sequences[1::2])
    assert [sequence.pages for sequence in sequences[::2]] == [[]] * 3
