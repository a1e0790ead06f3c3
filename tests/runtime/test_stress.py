"""Many sessions at once, a third of them cancelled at random moments: the rest are exact and nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import random
from pathlib import Path

import psutil
import pytest

from hat_runtime.device.generator import Generator
from tests.runtime.test_generator import Reference, ask, device_and_cloud, make_prompts

SESSIONS = 32
NEW = 24


async def answer(generator: Generator, prompt: list[int]) -> list[int]:
    return [event.token_id async for event in generator.generate(ask(generator, prompt, NEW))]


async def one_wave(
    generator: Generator, prompts: list[list[int]], expected: list[list[int]], seed: int
) -> None:
    rng = random.Random(seed)
    tasks = [asyncio.create_task(answer(generator, prompt)) for prompt in prompts]
    doomed = set(rng.sample(range(len(tasks)), len(tasks) // 3))
    for index in sorted(doomed, key=lambda _: rng.random()):
        await asyncio.sleep(rng.uniform(0, 0.05))
        tasks[index].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for index, result in enumerate(results):
        if isinstance(result, asyncio.CancelledError):
            assert index in doomed
        else:
            assert result == expected[index]


async def waves(tiny_llama: Path, count: int) -> None:
    """`device_and_cloud` checks pages and sessions on its way out; tasks and memory are checked here."""
    prompts = make_prompts(SESSIONS, seed=4)
    reference = Reference(tiny_llama)
    expected = [reference.greedy(prompt, NEW) for prompt in prompts]
    async with device_and_cloud(tiny_llama) as (generator, cloud):
        process = psutil.Process()
        for seed in range(3):  # allocator, gRPC and torch reach their working size
            await one_wave(generator, prompts, expected, seed)
        gc.collect()
        memory, tasks = process.memory_info().rss, len(asyncio.all_tasks())
        for seed in range(count):
            await one_wave(generator, prompts, expected, 100 + seed)
        generator.conversations.clear()
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > tasks or cloud.engine._sessions:
                await asyncio.sleep(0.02)
        gc.collect()
        assert process.memory_info().rss <= 1.05 * memory


async def test_stress_a_third_is_cancelled(tiny_llama: Path) -> None:
    await waves(tiny_llama, count=3)


@pytest.mark.long
async def test_stress_for_long(tiny_llama: Path) -> None:
    await waves(tiny_llama, count=60)


async def test_every_round_is_a_verify_pass_of_the_cloud(tiny_llama: Path) -> None:
    """A device has no other source of tokens: without the cloud it answers nothing."""
    async with device_and_cloud(tiny_llama) as (generator, cloud):
        requests = [ask(generator, prompt, NEW) for prompt in make_prompts(8, seed=6)]

        async def run(request: object) -> int:
            return len([event async for event in generator.generate(request)])  # type: ignore[arg-type]

        tokens = await asyncio.gather(*(run(request) for request in requests))
        passes = cloud.metrics.registry.get_sample_value("hat_verify_passes_total")
        assert sum(request.stats.rounds for request in requests) == passes
        assert sum(tokens) == passes, "no drafting yet: a token a round"
