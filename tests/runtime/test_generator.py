"""The generation loop against a real cloud: the tokens of transformers, whatever the chunks and the company."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hat_runtime.cloud.engine import EngineConfig
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, Generator, GeneratorConfig
from hat_runtime.device.recovery import RecoveryConfig
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.submodels import DeviceFull
from hat_runtime.errors import CloudUnavailable, HandshakeError, UsageError
from tests.tiny_models import ARCHITECTURES

CHUNKS = (1, 7, 64, 0)
ROW_BYTES = 64 * 4


@asynccontextmanager
async def device_and_cloud(
    model: Path,
    config: GeneratorConfig | None = None,
    *,
    kv_tokens: int = 8192,
    page_tokens: int = 16,
    **cloud: Any,
) -> AsyncIterator[tuple[Generator, RunningCloud]]:
    """Both sides on loopback. On the way out: no page, session or worker is left over on either side."""
    cloud = {"input_layers": 2, "dtype": "float32", "kv_bytes": 64 << 20, "drain_s": 0.1} | cloud
    async with running_cloud(CloudConfig(model, page_tokens=page_tokens, **cloud)) as running:
        generator = await connect(
            model, running.address, "float32", config=config, kv_tokens=kv_tokens, page_tokens=page_tokens
        )
        try:
            yield generator, running
            generator.conversations.clear()
            await generator.model.call(lambda: generator.model.cache.check([]))
            assert not generator.link.sessions
            async with asyncio.timeout(10):
                while running.engine.runner.cache.free_pages < running.engine.runner.cache.num_pages:
                    await asyncio.sleep(0.01)
            await running.engine.idle()
        finally:
            await generator.close()


def make_prompts(count: int, seed: int = 0, low: int = 3, high: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 199) for _ in range(rng.randint(low, high))] for _ in range(count)]


class Reference:
    """transformers' own generate with the whole model."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        out = self.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new)
        return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


def ask(generator: Generator, prompt: list[int], new: int, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, new, stop_ids=generator.model.eos_token_ids, **fields)


async def ids(generator: Generator, request: GenerationRequest) -> list[int]:
    return [event.token_id async for event in generator.generate(request)]


async def answer(generator: Generator, prompt: list[int], new: int, **fields: Any) -> list[int]:
    return await ids(generator, ask(generator, prompt, new, **fields))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("page_tokens", [1, 16])
async def test_same_tokens_as_transformers(
    tiny_models: dict[str, Path], architecture: str, page_tokens: int
) -> None:
    prompts = make_prompts(8, seed=page_tokens, high=70)
    whole = Reference(tiny_models[architecture])
    want = [whole.greedy(prompt, 10) for prompt in prompts]
    policy = GeneratorConfig(min_reuse_tokens=10_000)
    async with device_and_cloud(tiny_models[architecture], policy, page_tokens=page_tokens) as (
        generator,
        cloud,
    ):
        for chunk in CHUNKS:
            alone = [await answer(generator, prompt, 10, chunk_tokens=chunk) for prompt in prompts[:2]]
            assert alone == want[:2]
            together = await asyncio.gather(*(answer(generator, p, 10, chunk_tokens=chunk) for p in prompts))
            assert together == want
        rounds = generator.metrics.registry.get_sample_value("hat_verify_rounds_total")
        assert rounds == cloud.metrics.registry.get_sample_value("hat_verify_passes_total") > 0


@pytest.mark.parametrize("sampling", [SamplingParams(0.8, seed=11), SamplingParams(1.3, 0.8, seed=12)])
async def test_a_seed_gives_one_text(tiny_llama: Path, sampling: SamplingParams) -> None:
    """Alone, in a batch of 8 and at any chunk size; another seed gives another text."""
    prompt, *others = make_prompts(8, seed=5, low=40)
    async with device_and_cloud(tiny_llama, GeneratorConfig(min_reuse_tokens=10_000)) as (generator, _):
        want = await answer(generator, prompt, 24, sampling=sampling)
        for chunk in CHUNKS:
            same, *_ = await asyncio.gather(
                answer(generator, prompt, 24, sampling=sampling, chunk_tokens=chunk),
                *(
                    answer(generator, p, 24, sampling=SamplingParams(1.0, seed=i))
                    for i, p in enumerate(others)
                ),
            )
            assert same == want
        assert want != await answer(generator, prompt, 24, sampling=SamplingParams(0.8, seed=99))


async def test_a_stop_token_ends_the_text_and_is_part_of_it(tiny_llama: Path, reference: Reference) -> None:
    prompt = make_prompts(1)[0]
    text = reference.greedy(prompt, 12)
    request = GenerationRequest(prompt, 12, stop_ids=frozenset({text[5]}))
    async with device_and_cloud(tiny_llama) as (generator, _):
        got = await ids(generator, request)
    assert got == text[: text.index(text[5]) + 1]
    assert request.stats.finish_reason == "stop"
    assert request.stats.completion_tokens == request.stats.rounds == len(got)


async def test_figures_of_a_request(tiny_llama: Path) -> None:
    request = GenerationRequest(make_prompts(1, low=50)[0], 10, chunk_tokens=16)
    async with device_and_cloud(tiny_llama) as (generator, cloud):
        events = [event async for event in generator.generate(request)]
        sessions_up = cloud.metrics.registry.get_sample_value("hat_uplink_bytes_total")
    stats = request.stats
    assert [event.index for event in events] == list(range(10))
    assert (stats.completion_tokens, stats.finish_reason, stats.chunk_tokens) == (10, "length", 16)
    assert stats.ttft_s > 0
    assert stats.tbt_s == pytest.approx((events[-1].time_s - events[0].time_s) / 9)
    rows_up = len(request.prompt_ids) + 9
    assert rows_up * ROW_BYTES < stats.uplink_bytes < rows_up * ROW_BYTES + 1500
    assert stats.uplink_bytes <= sessions_up  # the cloud counts the same messages
    assert 10 * ROW_BYTES < stats.downlink_bytes < 10 * ROW_BYTES + 1500
    assert stats.cloud_compute_s > 0


async def test_the_second_turn_sends_only_its_new_tokens(tiny_llama: Path, reference: Reference) -> None:
    first = make_prompts(1, seed=2, low=80)[0]
    async with device_and_cloud(tiny_llama) as (generator, _):
        said = await answer(generator, first, 20)
        second = [*first, *said, *make_prompts(1, seed=3, low=12, high=12)[0]]
        request = ask(generator, second, 5)
        assert await ids(generator, request) == reference.greedy(second, 5)
        stats = request.stats
        assert stats.cached_tokens == len(first) + 19  # the last token's states were never needed
        rows_up = len(second) - stats.cached_tokens + stats.completion_tokens - 1
        assert rows_up * ROW_BYTES < stats.uplink_bytes < rows_up * ROW_BYTES + 800
        assert len(generator.link.sessions) == 1

        # The same prompt once more: its last token is computed again.
        request = ask(generator, second, 5)
        assert await ids(generator, request) == reference.greedy(second, 5)
        assert request.stats.cached_tokens == len(second) - 1


async def test_an_edited_turn_keeps_what_is_before_the_edit(tiny_llama: Path, reference: Reference) -> None:
    first = make_prompts(1, seed=4, low=80)[0]
    edited = [*first[:50], first[50] % 190 + 4, *first[51:70]]
    async with device_and_cloud(tiny_llama) as (generator, _):
        await answer(generator, first, 10)
        request = ask(generator, edited, 10)
        assert await ids(generator, request) == reference.greedy(edited, 10)
        assert request.stats.cached_tokens == 50


async def test_truncation_at_random_positions(tiny_llama: Path, reference: Reference) -> None:
    rng = random.Random(8)
    prompt = make_prompts(1, seed=6, low=90)[0]
    async with device_and_cloud(tiny_llama, GeneratorConfig(min_reuse_tokens=1), page_tokens=1) as (
        generator,
        _,
    ):
        for turn in range(12):
            cut = rng.randint(1, len(prompt) - 1)
            prompt = [*prompt[:cut], *make_prompts(1, seed=100 + turn, low=5, high=40)[0]]
            chunk = rng.choice(CHUNKS)
            got = await answer(generator, prompt, 6, chunk_tokens=chunk)
            assert got == reference.greedy(prompt, 6)
            assert len(generator.link.sessions) <= 5


async def test_idle_conversations_are_bounded(tiny_llama: Path) -> None:
    async with device_and_cloud(tiny_llama, GeneratorConfig(max_idle_conversations=2)) as (generator, _):
        await asyncio.gather(*(answer(generator, prompt, 4) for prompt in make_prompts(6)))
        assert len(generator.conversations) == len(generator.link.sessions) == 2


async def cancelled_at(generator: Generator, request: GenerationRequest, rng: random.Random) -> None:
    """Start a request and leave it at a random moment, in one of the ways a caller has."""
    if rng.random() < 0.5:
        events = generator.generate(request)
        count = rng.randint(1, 8)
        async for _ in events:
            count -= 1
            if not count:
                break
        await events.aclose()  # type: ignore[attr-defined]
    else:
        task = asyncio.create_task(ids(generator, request))
        await asyncio.sleep(rng.random() * 0.15)
        task.cancel()
        await asyncio.wait([task])
    assert request.stats.finish_reason in ("cancelled", "length", "stop")


async def test_cancelled_requests_leave_nothing_and_disturb_nobody(
    tiny_llama: Path, reference: Reference
) -> None:
    rng = random.Random(3)
    prompts = make_prompts(18, seed=9)
    want = [reference.greedy(prompt, 12) for prompt in prompts]
    async with device_and_cloud(tiny_llama, max_sessions=64) as (generator, _):
        tasks_before = len(asyncio.all_tasks())
        for _ in range(2):  # the second time over sessions that the first one left
            jobs: list[Any] = []
            for index, prompt in enumerate(prompts):
                request = ask(generator, prompt, 12, chunk_tokens=rng.choice((7, 64, 0)))
                jobs.append(
                    cancelled_at(generator, request, rng) if index % 3 == 0 else ids(generator, request)
                )
            got = await asyncio.gather(*jobs)
            assert [g for g in got if g is not None] == [w for i, w in enumerate(want) if i % 3]
        assert generator.metrics.registry.get_sample_value("hat_num_sessions_running") == 0
        generator.conversations.clear()
        await asyncio.sleep(0.2)
        assert len(asyncio.all_tasks()) <= tasks_before


async def test_a_session_goes_on_after_a_cancelled_answer(tiny_llama: Path, reference: Reference) -> None:
    prompt = make_prompts(1, seed=10, low=60)[0]
    async with device_and_cloud(tiny_llama) as (generator, _):
        said: list[int] = []
        events = generator.generate(ask(generator, prompt, 40))
        async for event in events:
            said.append(event.token_id)
            if len(said) == 7:
                break
        await events.aclose()  # type: ignore[attr-defined]
        again = [*prompt, *said, 17, 23]
        request = ask(generator, again, 10)
        assert await ids(generator, request) == reference.greedy(again, 10)
        assert request.stats.cached_tokens >= len(prompt)


async def test_eviction_in_the_middle_of_answers(tiny_llama: Path, reference: Reference) -> None:
    """Pages for one and a half sessions: they take turns, and every text is the same as alone."""
    prompts = make_prompts(3, seed=12, low=70)
    want = [reference.greedy(prompt, 60) for prompt in prompts]
    requests = []
    async with device_and_cloud(tiny_llama, kv_pages=14) as (generator, cloud):
        requests = [ask(generator, prompt, 60, chunk_tokens=16) for prompt in prompts]
        assert await asyncio.gather(*(ids(generator, request) for request in requests)) == want
        assert cloud.metrics.registry.get_sample_value("hat_evictions_total") != 0
    assert sum(request.stats.evictions for request in requests) > 0


async def test_an_idle_conversation_that_lost_its_pages_starts_over(
    tiny_llama: Path, reference: Reference
) -> None:
    first, other = make_prompts(2, seed=13, low=70)
    scheduler = SchedulerConfig(idle_after_s=0.0)
    async with device_and_cloud(tiny_llama, kv_pages=10, engine=EngineConfig(scheduler=scheduler)) as (
        generator,
        _,
    ):
        said = await answer(generator, first, 10)
        assert await answer(generator, other, 40) == reference.greedy(other, 40)
        turn = [*first, *said, 5, 6, 7]
        assert await answer(generator, turn, 10) == reference.greedy(turn, 10)


async def test_an_idle_conversation_that_the_cloud_ended_starts_over(
    tiny_llama: Path, reference: Reference
) -> None:
    first = make_prompts(1, seed=14, low=40)[0]
    async with device_and_cloud(tiny_llama, engine=EngineConfig(idle_ttl_s=0.2)) as (generator, _):
        said = await answer(generator, first, 10)
        async with asyncio.timeout(10):
            while generator.link.sessions:
                await asyncio.sleep(0.02)
        request = ask(generator, [*first, *said, 9], 10)
        assert await ids(generator, request) == reference.greedy([*first, *said, 9], 10)
        assert request.stats.cached_tokens == 0


@pytest.mark.parametrize("prompt_tokens", [500, 600])
async def test_a_text_beyond_the_context_is_refused(tiny_llama: Path, prompt_tokens: int) -> None:
    async with device_and_cloud(tiny_llama) as (generator, cloud):
        request = ask(generator, [5] * prompt_tokens, 20)
        with pytest.raises(UsageError, match=rf"{prompt_tokens} tokens.*20 new.*512"):
            await ids(generator, request)
        assert cloud.metrics.registry.get_sample_value("hat_uplink_bytes_total") < 100  # Describe only


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_ids": []}, "no token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt_ids": [4, 199]}, "vocabulary of 199"),
        ({"chunk_tokens": -1}, "chunk_tokens is -1"),
    ],
)
async def test_wrong_requests_are_refused(tiny_llama: Path, fields: dict[str, Any], text: str) -> None:
    async with device_and_cloud(tiny_llama) as (generator, _):
        with pytest.raises(UsageError, match=text):
            await ids(generator, GenerationRequest(**({"prompt_ids": [4, 5], "max_new_tokens": 3} | fields)))


async def test_a_full_device_says_so_and_recovers(tiny_llama: Path, reference: Reference) -> None:
    short, long = make_prompts(1, seed=15, low=40, high=40)[0], [7] * 200
    async with device_and_cloud(tiny_llama, kv_tokens=64) as (generator, _):
        with pytest.raises(DeviceFull, match="KV cache is full"):
            await answer(generator, long, 5)
        assert await answer(generator, short, 10) == reference.greedy(short, 10)
        # The idle conversation makes room for the next one.
        other = make_prompts(1, seed=16, low=40, high=40)[0]
        assert await answer(generator, other, 10) == reference.greedy(other, 10)


async def test_a_full_cloud_says_when_to_try_again(tiny_llama: Path, reference: Reference) -> None:
    first, second = make_prompts(2, seed=17)
    async with device_and_cloud(tiny_llama, max_sessions=1) as (generator, _):
        events = generator.generate(ask(generator, first, 20))
        await anext(aiter(events))
        with pytest.raises(CloudUnavailable, match="full") as refused:
            await answer(generator, second, 5)
        assert refused.value.retry_after_s is not None
        await events.aclose()  # type: ignore[attr-defined]


async def test_a_cloud_that_goes_away_ends_the_answer(tiny_llama: Path) -> None:
    prompt = make_prompts(1)[0]
    config = CloudConfig(tiny_llama, 2, dtype="float32", kv_bytes=1 << 24, drain_s=0.0)
    async with running_cloud(config) as cloud:
        impatient = GeneratorConfig(recovery=RecoveryConfig(reconnect_for_s=0.5))
        generator = await connect(tiny_llama, cloud.address, "float32", config=impatient)
        request = ask(generator, prompt, 400)
        events = aiter(generator.generate(request))
        await anext(events)
    with pytest.raises(CloudUnavailable):
        _ = [event async for event in events]
    assert request.stats.finish_reason == "error"
    await generator.model.call(lambda: generator.model.cache.check([]))
    with pytest.raises(CloudUnavailable, match="cannot be reached"):
        await answer(generator, prompt, 5)
    await generator.close()


async def test_another_model_is_refused_with_both_names(tiny_llama: Path, other_llama: Path) -> None:
    async with running_cloud(CloudConfig(tiny_llama, 2, dtype="float32", kv_bytes=1 << 24)) as cloud:
        with pytest.raises(HandshakeError, match=f"weights_id differs: .*{cloud.identity.weights_id}"):
            await connect(other_llama, cloud.address, "float32")
        with pytest.raises(HandshakeError, match=r"dtype differs: bfloat16 .* float32 .*--dtype float32"):
            await connect(tiny_llama, cloud.address, "bfloat16")


async def test_nobody_there(tiny_llama: Path) -> None:
    with pytest.raises(CloudUnavailable, match=r"127\.0\.0\.1:9 cannot be reached.*hat cloud serve"):
        await connect(tiny_llama, "127.0.0.1:9", "float32")


async def test_a_request_that_is_cancelled_while_it_takes_over_a_conversation_leaves_it(
    tiny_llama: Path,
) -> None:
    """Stop, ask again, stop again, all within one round: the fixture looks at what is left over."""
    prompt = make_prompts(1, seed=5, low=80, high=90)[0]
    async with device_and_cloud(tiny_llama) as (generator, cloud):
        forward, held = cloud.engine._forward, threading.Event()

        def slow(planned: Any) -> Any:
            held.wait(10)
            return forward(planned)

        answer = generator.generate(ask(generator, prompt, 30))
        async for _ in answer:
            cloud.engine._forward = slow  # type: ignore[method-assign]
            await asyncio.sleep(0.05)
            break
        await answer.aclose()
        assert len(generator.conversations) == 1
        again = asyncio.create_task(anext(generator.generate(ask(generator, prompt, 30))))
        while len(generator.conversations):
            await asyncio.sleep(0.01)
        again.cancel()
        await asyncio.wait((again,))
        assert len(generator.conversations) == 1
        held.set()
