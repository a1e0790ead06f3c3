"""A device that loses the cloud: what it sends again, how long it tries, and what becomes of conversations."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, GenerationStats, Generator, GeneratorConfig
from hat_runtime.device.recovery import RecoveryConfig
from hat_runtime.emulation.link import EmulatedLink, emulated_link
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import CloudUnavailable
from tests.runtime.faulting import Want, whole_text

ROW_BYTES = 64 * 4
LONG = [(7 * n) % 190 + 4 for n in range(200)]


@pytest.fixture(scope="module")
def want(tiny_llama: Path) -> Want:
    return whole_text(tiny_llama)


@dataclass
class Pair:
    generator: Generator
    cloud: RunningCloud
    link: EmulatedLink

    async def answer(
        self,
        request: GenerationRequest,
        at: Callable[[int], bool] = lambda count: False,
        fault: Callable[[], None] | None = None,
        got: list[int] | None = None,
    ) -> list[int]:
        """The tokens, in `got` as well; with a fault (the link is cut) where `at` says so, by their number."""
        tokens = [] if got is None else got
        async for event in self.generator.generate(request):
            tokens.append(event.token_id)
            if at(len(tokens)):
                (fault or self.link.cut)()
        return tokens

    def resumes(self, cause: str) -> float:
        return (
            self.generator.metrics.registry.get_sample_value("hat_session_resumes_total", {"cause": cause})
            or 0.0
        )

    def in_cloud(self, name: str, **labels: str) -> float:
        return self.cloud.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def pair(model: Path, recovery: RecoveryConfig | None = None, **fields: Any) -> AsyncIterator[Pair]:
    """Without a drafter, so that every round is one row."""
    config = CloudConfig(model, 2, **({"dtype": "float32", "kv_pages": 256, "drain_s": 0.0} | fields))
    async with running_cloud(config) as cloud:
        with emulated_link(cloud.address, LinkSpec.parse("100mbit,4ms")) as link:
            policy = GeneratorConfig(recovery=recovery or RecoveryConfig())
            generator = await connect(model, link.address, "float32", config=policy)
            try:
                yield Pair(generator, cloud, link)
                generator.conversations.clear()
                async with asyncio.timeout(20):
                    while cloud.engine._sessions or generator.link.parting:
                        await asyncio.sleep(0.01)
                assert not generator.link.sessions
                await cloud.engine.idle()
            finally:
                await generator.close()


def ask(prompt: list[int], new: int = 12, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, new, **fields)


async def test_a_resume_sends_no_prompt_again(tiny_llama: Path, want: Want) -> None:
    request = ask(LONG)
    async with pair(tiny_llama) as both:
        assert await both.answer(request, lambda count: count == 6) == want(request)
        assert both.resumes("connection") == request.stats.resumes == 1
        assert request.stats.evictions == 0
        rows = len(LONG) + 12 + 3  # each round once, and those under way at the cut once more
        assert request.stats.uplink_bytes < rows * ROW_BYTES + 4000


async def test_a_prompt_goes_on_where_it_was(tiny_llama: Path, want: Want) -> None:
    """The link breaks when half of it is in the cloud, which does not compute that half again."""
    request = ask(LONG, chunk_tokens=8)
    async with pair(tiny_llama) as both:
        both.link.set_link(LinkSpec.parse("1mbit,4ms"))
        answering = asyncio.create_task(both.answer(request))
        while both.in_cloud("hat_kv_cache_usage_ratio") * 256 * 16 < len(LONG) / 2:
            await asyncio.sleep(0.001)
        both.link.cut()
        assert await answering == want(request)
        assert request.stats.resumes == 1
        kinds = ("prefill", "short")
        computed = sum(both.in_cloud("hat_tokens_computed_total", kind=kind) for kind in kinds)
        assert computed < 1.3 * len(LONG)


async def test_without_a_session_in_the_cloud_all_is_sent_again(tiny_llama: Path, want: Want) -> None:
    request = ask(LONG)
    async with pair(tiny_llama, resume_ttl_s=0.0) as both:
        assert await both.answer(request, lambda count: count == 6) == want(request)
        assert both.resumes("session") == request.stats.resumes == 1
        assert request.stats.uplink_bytes > 2 * len(LONG) * ROW_BYTES


async def test_an_idle_conversation_comes_back_by_itself(tiny_llama: Path, want: Want) -> None:
    """At once, so that its time in the cloud does not run out; the next turn sends only its new tokens."""
    first = ask(LONG)
    async with pair(tiny_llama) as both:
        said = await both.answer(first)
        before = set(both.generator.link.sessions)
        both.link.cut()
        async with asyncio.timeout(20):
            while both.resumes("connection") < 1 or before & both.generator.link.sessions:
                await asyncio.sleep(0.01)
        assert both.in_cloud("hat_num_sessions_lost") == 0
        second = ask([*LONG, *said, 5, 6, 7])
        assert await both.answer(second) == want(second)
        assert second.stats.cached_tokens >= len(LONG)
        assert second.stats.uplink_bytes < (12 + 12) * ROW_BYTES + 4000


async def test_a_turn_that_comes_while_the_link_is_away_waits_for_it(tiny_llama: Path, want: Want) -> None:
    first = ask(LONG)
    async with pair(tiny_llama) as both:
        said = await both.answer(first)
        both.link.outage(1.0)
        await asyncio.sleep(0.1)
        second = ask([*LONG, *said, 5, 6, 7])
        assert await both.answer(second) == want(second)
        assert second.stats.cached_tokens >= len(LONG)


async def test_an_idle_conversation_that_is_gone_begins_anew(tiny_llama: Path, want: Want) -> None:
    first = ask(LONG)
    async with pair(tiny_llama, resume_ttl_s=0.2) as both:
        said = await both.answer(first)
        both.link.outage(1.0)
        async with asyncio.timeout(20):
            while len(both.generator.conversations):
                await asyncio.sleep(0.01)
            while not await reachable(both.generator):
                await asyncio.sleep(0.01)
        second = ask([*LONG, *said, 5, 6, 7])
        assert await both.answer(second) == want(second)
        assert second.stats.cached_tokens == 0


async def reachable(generator: Generator) -> bool:
    try:
        await generator.link.describe()
    except CloudUnavailable:
        return False
    return True


async def test_a_cloud_that_stays_away_is_told_with_the_time(tiny_llama: Path, want: Want) -> None:
    """All that was certain has been told; a request that never reached the cloud is told sooner."""
    request = ask(LONG, 40)
    async with pair(tiny_llama, RecoveryConfig(reconnect_for_s=0.5), resume_ttl_s=2.0) as both:
        got: list[int] = []
        with pytest.raises(CloudUnavailable, match=r"cannot be reached.*tried for 0\.5 s to go on"):
            await both.answer(request, lambda count: count == 5, lambda: both.link.outage(4.0), got)
        assert len(got) >= 5
        assert got == want(request)[: len(got)]
        assert request.stats.finish_reason == "error"
        with pytest.raises(CloudUnavailable, match="cannot be reached"):
            await both.answer(ask([4, 5, 6]))
        async with asyncio.timeout(30):
            while not await reachable(both.generator):
                await asyncio.sleep(0.1)
        again = replace(request, stats=GenerationStats())
        assert await both.answer(again) == want(again)


@pytest.mark.parametrize(
    ("recovery", "text"),
    [
        (RecoveryConfig(max_recoveries=2), "lost 3 times during this request, which is too often"),
        (RecoveryConfig(reconnect_for_s=0.0), "cannot be reached|cancelled the session|ended the session"),
    ],
)
async def test_recoveries_are_bounded(
    tiny_llama: Path, want: Want, recovery: RecoveryConfig, text: str
) -> None:
    request = ask(LONG, 200)
    got: list[int] = []
    async with pair(tiny_llama, recovery, resume_ttl_s=2.0) as both:
        with pytest.raises(CloudUnavailable, match=text):
            await both.answer(request, lambda count: count % 10 == 0, got=got)
        assert request.stats.resumes == (recovery.max_recoveries if recovery.reconnect_for_s else 0)
        assert got == want(request)[: len(got)]


async def test_many_answers_on_one_connection_all_go_on(tiny_llama: Path, want: Want) -> None:
    requests = [ask(LONG[n : n + 40], 24) for n in range(12)]
    async with pair(tiny_llama) as both:
        answers = [asyncio.create_task(both.answer(request)) for request in requests]
        while sum(request.stats.completion_tokens for request in requests) < 100:
            await asyncio.sleep(0.001)
        both.link.cut()
        assert await asyncio.gather(*answers) == [want(request) for request in requests]
        assert sum(request.stats.resumes for request in requests) == both.resumes("connection") > 0


async def test_a_resume_that_is_late_does_not_end_the_session(tiny_llama: Path, want: Want) -> None:
    """A pass longer than the device waits for a session: the next try resumes what the first one asked for."""
    request = ask(LONG)
    async with pair(tiny_llama) as both:
        forward, late = both.cloud.engine._forward, threading.Event()

        def slow(planned: Any) -> Any:
            late.wait(20)
            return forward(planned)

        def stall() -> None:
            both.generator.link.timeout_s = 0.5
            both.cloud.engine._forward = slow  # type: ignore[method-assign]
            asyncio.get_running_loop().call_later(0.2, both.link.cut)
            asyncio.get_running_loop().call_later(1.5, late.set)

        assert await both.answer(request, lambda count: count == 6, stall) == want(request)
        assert both.resumes("connection") >= 1
        assert both.resumes("session") == 0
        assert request.stats.evictions == 0
