"""Token mode gives the whole model's text, whatever the draft model, gamma, window, sampler and link."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hat_runtime.device.generator import GenerationRequest, GeneratorConfig
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.device.token_generator import TokenGenerator
from tests.runtime.picospec_pair import Whole, perturbed, picospec
from tests.runtime.test_generator import make_prompts

LINKS = {"loopback": None, "20 ms": "60mbit,20ms", "100 ms with jitter": "20mbit,100ms,20ms"}
NEW = 14
ALL_DRAFTS: dict[str, Any] = {"ahead": 1, "adaptive": False}
"""The cloud waits for drafts, which a tiny model's own decoding would overtake."""


@pytest.fixture(scope="module")
def whole(tiny_llama: Path) -> Whole:
    return Whole(tiny_llama)


@pytest.fixture(scope="module")
def drafts(tiny_llama: Path, other_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    close = perturbed(tiny_llama, tmp_path_factory.mktemp("models") / "close")
    return {"random": other_llama, "target itself": tiny_llama, "close": close}


async def ids(generator: TokenGenerator, request: GenerationRequest) -> list[int]:
    return [event.token_id async for event in generator.generate(request)]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("gamma", [1, 4])
async def test_greedy_text_is_the_whole_models(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole, gamma: int, window: int, link: str
) -> None:
    prompts = make_prompts(3, seed=gamma)
    want = [whole.decode(prompt, NEW) for prompt in prompts]
    for name, draft in drafts.items():
        speculation = SpeculationConfig(max_draft=gamma, window=window, **ALL_DRAFTS)
        async with picospec(tiny_llama, draft, speculation, link=LINKS[link]) as (generator, _):
            requests = [GenerationRequest(prompt, NEW) for prompt in prompts]
            assert await asyncio.gather(*(ids(generator, request) for request in requests)) == want
        accepted = sum(request.stats.accepted_tokens for request in requests)
        drafted = sum(request.stats.draft_tokens for request in requests)
        assert 0 <= accepted <= drafted
        if name == "target itself":
            assert accepted >= 3 * NEW * (0.3 if gamma == 1 else 0.5)
            if gamma > 1:  # a round of one draft may give that draft and no token behind it
                assert sum(request.stats.rounds for request in requests) < 3 * NEW
        elif name == "close":
            assert accepted > 0


@pytest.mark.parametrize("link", LINKS)
async def test_text_that_the_cloud_decodes_on_by_itself(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole, link: str
) -> None:
    """As it does by default: drafts are in time or not."""
    prompts = make_prompts(3, seed=8)
    for draft in drafts.values():
        async with picospec(tiny_llama, draft, link=LINKS[link]) as (generator, _):
            for new in (1, 2, NEW, 60):
                requests = [GenerationRequest(prompt, new) for prompt in prompts]
                found = await asyncio.gather(*(ids(generator, request) for request in requests))
                assert found == [whole.decode(prompt, new) for prompt in prompts]


@pytest.mark.parametrize("sampler", ["coupled", "thinning", "topk"])
@pytest.mark.parametrize("step_drafts", [1, None])
async def test_every_sampler_is_greedy_at_temperature_0(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole, sampler: str, step_drafts: int | None
) -> None:
    prompt = make_prompts(1, seed=20)[0]
    speculation = SpeculationConfig(sampler=sampler, step_drafts=step_drafts, ahead=3)
    async with picospec(tiny_llama, drafts["close"], speculation) as (generator, _):
        assert await ids(generator, GenerationRequest(prompt, 30)) == whole.decode(prompt, 30)


@pytest.mark.parametrize("params", [SamplingParams(0.8, seed=11), SamplingParams(1.3, 0.8, seed=-12)])
async def test_coupled_text_is_plain_seeded_sampling(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole, params: SamplingParams
) -> None:
    prompts = make_prompts(4, seed=5)
    want = [whole.decode(prompt, NEW, params) for prompt in prompts]
    for draft, gamma, window, step, ahead, link in (
        ("random", 4, 2, None, 1, None),
        ("close", 4, 2, 1, 1, "60mbit,20ms,5ms"),
        ("close", 3, 3, 2, 4, None),
        ("close", 4, 1, None, 0, None),
        ("target itself", 4, 2, None, 1, "60mbit,20ms"),
        ("random", 0, 2, None, 1, None),
    ):
        speculation = SpeculationConfig(max_draft=gamma, window=window, step_drafts=step, ahead=ahead)
        async with picospec(tiny_llama, drafts[draft], speculation, link=link) as (generator, _):
            requests = [GenerationRequest(prompt, NEW, params) for prompt in prompts]
            assert await asyncio.gather(*(ids(generator, request) for request in requests)) == want


async def test_a_stop_token_ends_the_text_and_is_part_of_it(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole
) -> None:
    prompt = make_prompts(1)[0]
    text = whole.decode(prompt, 12)
    stop = frozenset({text[5]})
    for gamma in (0, 4):
        async with picospec(tiny_llama, drafts["target itself"], SpeculationConfig(gamma)) as (generator, _):
            request = GenerationRequest(prompt, 12, stop_ids=stop)
            assert await ids(generator, request) == text[: text.index(text[5]) + 1]
            assert request.stats.finish_reason == "stop"


async def test_the_next_turn_sends_only_its_new_tokens(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole
) -> None:
    for gamma, window in ((0, 2), (4, 1), (4, 2)):
        speculation = SpeculationConfig(gamma, window)
        async with picospec(tiny_llama, drafts["close"], speculation) as (generator, _):
            text = make_prompts(1, seed=2, low=80)[0]
            for turn in range(4):
                params = SamplingParams(0.9 * (turn % 2), seed=turn)
                request = GenerationRequest(text, 20, params)
                said = await ids(generator, request)
                assert said == whole.decode(text, 20, params)
                if turn:
                    assert request.stats.cached_tokens >= len(text) - 40
                text = [*text, *said, 5 + turn, 9]
            assert len(generator.link.sessions) == 1


async def test_eviction_in_the_middle_of_answers(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole
) -> None:
    prompts = make_prompts(3, seed=12, low=70)
    want = [whole.decode(prompt, 60) for prompt in prompts]
    for gamma in (0, 4):
        async with picospec(tiny_llama, drafts["close"], SpeculationConfig(gamma), kv_pages=14) as (
            generator,
            cloud,
        ):
            requests = [GenerationRequest(prompt, 60) for prompt in prompts]
            assert await asyncio.gather(*(ids(generator, request) for request in requests)) == want
            assert cloud.metrics.registry.get_sample_value("hat_evictions_total") != 0
        assert sum(request.stats.evictions for request in requests) > 0


async def test_cancelled_requests_leave_nothing_and_disturb_nobody(
    tiny_llama: Path, drafts: dict[str, Path], whole: Whole
) -> None:
    prompts = make_prompts(12, seed=9)
    want = [whole.decode(prompt, NEW) for prompt in prompts]
    config = GeneratorConfig(max_idle_conversations=2)
    async with picospec(tiny_llama, drafts["close"], config=config) as (generator, _):
        tasks_before = len(asyncio.all_tasks())

        async def left(request: GenerationRequest, count: int) -> None:
            events = generator.generate(request)
            async for _ in events:
                count -= 1
                if not count:
                    break
            await events.aclose()  # type: ignore[attr-defined]
            assert request.stats.finish_reason == "cancelled"

        async def cancelled(request: GenerationRequest, after_s: float) -> None:
            task = asyncio.create_task(ids(generator, request))
            await asyncio.sleep(after_s)
            task.cancel()
            await asyncio.wait([task])

        for _ in range(2):
            jobs = []
            for index, prompt in enumerate(prompts):
                request = GenerationRequest(prompt, NEW)
                if index % 3 == 0:
                    jobs.append(left(request, 1 + index))
                elif index % 3 == 1:
                    jobs.append(cancelled(GenerationRequest(prompt, 300), 0.01 * index))
                else:
                    jobs.append(ids(generator, request))
            got = await asyncio.gather(*jobs)
            assert got[2::3] == want[2::3]
        assert generator.metrics.registry.get_sample_value("hat_num_sessions_running") == 0
        generator.conversations.clear()
        await asyncio.sleep(0.2)
        assert len(asyncio.all_tasks()) <= tasks_before
