"""Drafting where something ends: the context, the cloud's memory, a worker's function."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import pytest

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.device.connect import connect
from hat_runtime.device.drafting.base import Draft, Wish
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from tests.lockstep import check_drafter
from tests.runtime.speculating import speculating
from tests.runtime.test_generator import Reference, answer, ask, ids, make_prompts
from tests.tiny_drafters import INPUT_LAYERS, perturbed

EAGER = DraftConfig(6, stop_threshold=0.0, adaptive=False)


@pytest.mark.parametrize("link", ["", "100mbit,20ms"])
@pytest.mark.parametrize("drafter", ["ngram", "itself"])
async def test_drafts_at_the_end_of_the_context(tiny_llama: Path, drafter: str, link: str) -> None:
    """The cloud ends a session that goes beyond its longest text, also with a draft that would be refused."""
    rng = random.Random(6)  # its text ends with a repetition, so that there are n-grams
    prompt, new = ([rng.randrange(3, 199) for _ in range(7)] * 80)[:495], 17
    want = Reference(tiny_llama).greedy(prompt, new)
    assert len(want) == new
    name = f"model:{tiny_llama}" if drafter == "itself" else drafter
    async with speculating(tiny_llama, name, EAGER, link) as (generator, _):
        assert generator.context_tokens == len(prompt) + new
        request = ask(generator, prompt, new)
        assert await ids(generator, request) == want
        assert request.stats.evictions == 0
        if drafter == "itself":
            assert 0 < request.stats.accepted_tokens == request.stats.draft_tokens < new


async def test_a_function_that_fails_does_not_end_the_worker(tiny_llama: Path) -> None:
    """What it was to prepare is missing, and that is all."""
    prompt = make_prompts(1, seed=3)[0]

    def fail() -> None:
        raise RuntimeError("out of memory")

    failing: Callable[[object, object], None] = lambda state, tokens: fail()  # noqa: E731
    async with speculating(tiny_llama, "ngram", EAGER) as (generator, _), asyncio.timeout(60):
        assert generator.model.drafter is not None
        generator.model.drafter.prepare = failing  # type: ignore[method-assign]
        assert await answer(generator, prompt, 8) == Reference(tiny_llama).greedy(prompt, 8)


async def test_evictions_while_drafting(tiny_llama: Path, tmp_path: Path) -> None:
    """The cloud's memory is too small for all sessions: they take turns, and no draft survives an eviction wrongly."""
    prompts = make_prompts(3, seed=12, low=70)
    whole = Reference(tiny_llama)
    want = [whole.greedy(prompt, 24) for prompt in prompts]
    name = f"model:{perturbed(tiny_llama, tmp_path / 'perturbed', 0.02)}"
    config = CloudConfig(tiny_llama, INPUT_LAYERS, dtype="float32", kv_pages=45, drain_s=0.1, page_tokens=4)
    async with running_cloud(config) as cloud:
        generator = await connect(
            tiny_llama,
            cloud.address,
            "float32",
            config=GeneratorConfig(drafting=EAGER, max_evictions=100),
            drafter=name,
        )
        try:
            requests = [ask(generator, prompt, 24, chunk_tokens=16) for prompt in prompts]
            assert await asyncio.gather(*(ids(generator, request) for request in requests)) == want
            assert sum(request.stats.evictions for request in requests) > 0
            assert sum(request.stats.draft_tokens for request in requests) > 0
            generator.conversations.clear()
            await generator.model.call(lambda: generator.model.cache.check([]))
            await generator.model.call(lambda: check_drafter(generator.model))
        finally:
            await generator.close()


@pytest.mark.parametrize("leaves", [False, True])
async def test_the_first_token_does_not_wait_for_drafts(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Also where whoever asked goes away while they are made: nothing is left over."""
    seen, waited = threading.Event(), []
    prompt = make_prompts(1, seed=3)[0]
    async with speculating(tiny_llama, "ngram", EAGER) as (generator, _), asyncio.timeout(60):
        drafter = generator.model.drafter
        assert drafter is not None
        propose = drafter.propose

        def propose_when_seen(wishes: Sequence[Wish]) -> list[Draft | None]:
            waited.append(seen.wait(20))
            return propose(wishes)

        monkeypatch.setattr(drafter, "propose", propose_when_seen)
        events = generator.generate(ask(generator, prompt, 12))
        first = await anext(events)
        seen.set()
        if leaves:
            assert isinstance(events, AsyncGenerator)
            await events.aclose()
        else:
            rest = [event async for event in events]
            assert [event.token_id for event in (first, *rest)] == Reference(tiny_llama).greedy(prompt, 12)
            assert [event.index for event in (first, *rest)] == list(range(12))
        assert waited or leaves
        assert all(waited)
        generator.conversations.clear()
