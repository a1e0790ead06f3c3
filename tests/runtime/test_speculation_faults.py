"""A link that stalls, breaks or is late while drafts are under way: the text is exact; nothing is left behind on either
side."""

from __future__ import annotations

import asyncio
import gc
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message

from hat_runtime.cloud.serve import RunningCloud, running_cloud
from hat_runtime.cloud.session import Failed
from hat_runtime.device.generator import GenerationRequest, GenerationStats, Generator
from hat_runtime.device.jobs import Turn
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.refusals import CloudRefused
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.steps import ALL, LAST
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.emulation.link import EmulatedLink, emulated_link
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.lockstep import check_drafter
from tests.runtime import picospec_pair, speculating
from tests.runtime.picospec_pair import Whole
from tests.runtime.raw_cloud import WIDTH, raw_session
from tests.runtime.relay import Rewrite, relay
from tests.tiny_drafters import PROMPTS as TRAINED_ON

MODES = {"hybrid": "hybrid", "model": "close", "picospec": "close"}
"""Hidden states with two drafters, and token mode; what drafts."""
HAT = DraftConfig(4, window=None, branches=3, adaptive=False)
WIDE = replace(HAT, window=3)
"""Rounds leave ahead however little the drafter is trusted."""
PICOSPEC = SpeculationConfig(4, window=2, ahead=1, adaptive=False)
"""The cloud waits for drafts: a tiny model's own decoding would overtake them."""
LINK = "100mbit,20ms"
NEW = 32
PROMPTS = TRAINED_ON[:4]  # drafts are right about as often as not
CHUNK = 4
SAMPLINGS = (SamplingParams(), SamplingParams(0.8, seed=11), SamplingParams(1.3, 0.8, seed=12))


Want = Callable[[GenerationRequest], list[int]]


@pytest.fixture(scope="module")
def want(tiny_llama: Path) -> Want:
    """The whole model's text."""
    whole = Whole(tiny_llama)

    @cache
    def decode(prompt: tuple[int, ...], new: int, sampling: SamplingParams) -> list[int]:
        return whole.decode(list(prompt), new, sampling)

    return lambda request: decode(tuple(request.prompt_ids), request.max_new_tokens, request.sampling)


def running_tasks() -> Counter[str]:
    """By what they run: gRPC replaces tasks of its own with others of the kind."""
    return Counter(task.get_coro().__qualname__ for task in asyncio.all_tasks())


@dataclass
class Pair:
    """A device, its cloud, and the link between them."""

    generator: Generator
    cloud: RunningCloud
    link: EmulatedLink
    want: Want
    tasks: Counter[str] = field(default_factory=lambda: running_tasks())
    """Those of the idle pair."""
    complaints: list[str] = field(default_factory=list)
    """What the event loop was told of errors that nobody took."""

    @property
    def in_flight(self) -> int:
        """Steps without Result, of all sessions."""
        return sum(session.unanswered for session in self.generator.link.sessions)

    @property
    def deepest(self) -> int:
        """Most Steps without Result of a session."""
        return max((session.unanswered for session in self.generator.link.sessions), default=0)

    async def ids(self, request: GenerationRequest) -> list[int]:
        return [event.token_id async for event in self.generator.generate(request)]

    async def told(self, request: GenerationRequest) -> tuple[list[int], Exception | None]:
        """The tokens that the caller got, and what ended them."""
        got: list[int] = []
        events = aiter(self.generator.generate(request))
        try:
            while (event := await anext(events, None)) is not None:
                got.append(event.token_id)
        except Exception as error:
            return got, error
        return got, None

    async def check_exact(self, *requests: GenerationRequest) -> None:
        """Answered at the same time, they are the whole model's texts."""
        results = await asyncio.gather(*map(self.told, requests))
        assert results == [(self.want(request), None) for request in requests]

    def end_sessions_as_full(self) -> None:
        """As the cloud does with a session that finds no page."""
        engine = self.cloud.engine
        full = Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "the KV cache is full", retry_after_s=0.01)

        def end() -> None:
            for session in list(engine._sessions.values()):
                engine._fail(session, full)

        engine._inbox.put(end)

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that must come; the test's own time limit is the only one."""
        while not reached():
            await asyncio.sleep(0.0005)

    async def faulted(
        self, requests: list[GenerationRequest], point: str, fault: Callable[[], None]
    ) -> list[tuple[list[int], Exception | None]]:
        """Answer requests at the same time, with a fault at a point of the last one."""

        async def strike() -> None:
            await self.until(lambda: POINTS[point](self, requests[-1]))
            fault()

        striking = asyncio.create_task(strike())
        try:
            results = await asyncio.gather(*map(self.told, requests))
            assert striking.done(), f"the answers ended before {point!r}"
            return results
        finally:
            striking.cancel()

    async def nothing_is_left(self) -> None:
        """No session, page or task, on either side."""
        generator, engine = self.generator, self.cloud.engine
        generator.conversations.clear()
        assert not generator.link.sessions
        assert generator.model.rounds_in_flight == 0
        await generator.model.call(lambda: generator.model.cache.check([]))
        await generator.model.call(lambda: check_drafter(generator.model))
        cache, value = engine.runner.cache, self.cloud.metrics.registry.get_sample_value

        def left() -> dict[str, Any]:
            pages, sessions = cache.num_pages - cache.free_pages, value("hat_num_sessions_open")
            return {"pages": pages, "sessions": sessions, "tasks": running_tasks() - self.tasks}

        try:
            async with asyncio.timeout(10):
                while any(left().values()):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            pytest.fail(f"left over: {left()}")
        await engine.idle()


@asynccontextmanager
async def pair(
    mode: str,
    model: Path,
    drafters: dict[str, str],
    want: Want,
    link: str = LINK,
    rewrite: Rewrite | None = None,
    drafting: DraftConfig = HAT,
) -> AsyncIterator[Pair]:
    """A pair that leaves nothing behind; `rewrite` changes messages at the device's end of the link."""
    async with AsyncExitStack() as stack:
        config = speculating.cloud_config(model)
        if mode == "picospec":
            config = picospec_pair.cloud_config(model)
        cloud = await stack.enter_async_context(running_cloud(config))
        emulated = stack.enter_context(emulated_link(cloud.address, LinkSpec.parse(link)))
        address = emulated.address
        if rewrite is not None:
            address = await stack.enter_async_context(relay(address, rewrite))
        if mode == "picospec":
            draft = Path(drafters[MODES[mode]].removeprefix("model:"))
            device: Any = picospec_pair.device(model, draft, cloud, address, PICOSPEC)
        else:
            device = speculating.device(model, drafters[MODES[mode]], drafting, cloud, address)
        generator = await stack.enter_async_context(device)
        made = Pair(generator, cloud, emulated, want)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: made.complaints.append(repr(context)))
        stack.callback(loop.set_exception_handler, None)
        yield made
        await made.nothing_is_left()
        gc.collect()  # tasks and futures complain when they are collected
        assert not made.complaints


def ask(index: int = 0, sampling: SamplingParams = SAMPLINGS[0]) -> GenerationRequest:
    return GenerationRequest(PROMPTS[index], NEW, sampling, chunk_tokens=CHUNK)


def three() -> list[GenerationRequest]:
    return [ask(index, sampling) for index, sampling in enumerate(SAMPLINGS)]


POINTS: dict[str, Callable[[Pair, GenerationRequest], bool]] = {
    "prompt": lambda pair, request: request.stats.rounds == 0 and pair.in_flight > 0,
    "first round": lambda pair, request: request.stats.rounds == 1 and pair.in_flight > 0,
    "later": lambda pair, request: request.stats.completion_tokens >= NEW // 3 and pair.in_flight > 0,
    "two in flight": lambda pair, request: request.stats.completion_tokens > 1 and pair.deepest > 1,
}
"""Moments of an answer."""


@pytest.mark.parametrize("mode", MODES)
async def test_a_stall_only_delays(tiny_llama: Path, drafters: dict[str, str], want: Want, mode: str) -> None:
    """Greedy and sampled, alone and three at a time."""
    async with pair(mode, tiny_llama, drafters, want) as both:
        for requests in ([ask()], three()):
            results = await both.faulted(requests, "later", lambda: both.link.stall(2.0))
            assert results == [(both.want(request), None) for request in requests]
            assert sum(request.stats.draft_tokens for request in requests) > 0
            await both.nothing_is_left()


@pytest.mark.parametrize("mode", MODES)
async def test_a_cut_only_delays(tiny_llama: Path, drafters: dict[str, str], want: Want, mode: str) -> None:
    """At every point, three at a time: the sessions are resumed, and the texts are the uninterrupted ones."""
    async with pair(mode, tiny_llama, drafters, want) as both:
        for point in POINTS:
            print(point)  # shown where it fails
            both.generator.policy.config = WIDE if point == "two in flight" else HAT
            requests = three()
            results = await both.faulted(requests, point, both.link.cut)
            assert results == [(both.want(request), None) for request in requests]
            assert requests[-1].stats.resumes == 1
            await both.nothing_is_left()


@pytest.mark.parametrize("mode", MODES)
async def test_a_cut_between_or_in_the_prompt_of_a_later_turn_is_made_good(
    tiny_llama: Path, drafters: dict[str, str], want: Want, mode: str
) -> None:
    """The conversation is still the cloud's: the turn sends only its new tokens."""
    async with pair(mode, tiny_llama, drafters, want) as both:
        first = GenerationRequest(PROMPTS[0], 12, chunk_tokens=CHUNK)
        await both.check_exact(first)
        before = set(both.generator.link.sessions)
        both.link.cut()
        await both.until(lambda: not before & both.generator.link.sessions)
        second = replace(
            first, prompt_ids=[*first.prompt_ids, *both.want(first), 5, 9], stats=GenerationStats()
        )
        await both.check_exact(second)
        assert second.stats.cached_tokens >= len(first.prompt_ids)
        assert len(both.generator.link.sessions) == 1
        third = replace(
            first, prompt_ids=[*second.prompt_ids, *both.want(second), 6, 9], stats=GenerationStats()
        )
        assert await both.faulted([third], "prompt", both.link.cut) == [(both.want(third), None)]
        assert (third.stats.evictions, third.stats.resumes) == (0, 1)


@pytest.mark.parametrize("fault", ["cut", "full"])
async def test_a_session_that_ends_while_the_device_judges(
    tiny_llama: Path,
    drafters: dict[str, str],
    want: Want,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The next round cannot leave: the session is resumed, or where the cloud was only full, another one is opened."""
    async with pair("model", tiny_llama, drafters, want) as both:
        turn_of, judged = both.generator.model.turn, 0

        async def turn(spec: Any, deep: torch.Tensor | None, *args: Any, **fields: Any) -> Turn:
            nonlocal judged
            made = await turn_of(spec, deep, *args, **fields)
            judged += deep is not None
            if deep is not None and judged == 4:
                both.link.cut() if fault == "cut" else both.end_sessions_as_full()
                await both.until(lambda: not both.generator.link.sessions)
            return made

        monkeypatch.setattr(both.generator.model, "turn", turn)
        got, error = await both.told(request := ask())
        assert (got, error) == (both.want(request), None)
        assert (request.stats.resumes, request.stats.evictions) == ((1, 0) if fault == "cut" else (0, 1))


def kind(message: Message) -> str | None:
    """Of a message of the session's stream."""
    return message.WhichOneof("message") if isinstance(message, pb.DeviceMessage | pb.CloudMessage) else None


class LateResults:
    """Counts Results of epochs that the device has left behind; for one session at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._epoch = 0

    def __call__(self, message: Message) -> Iterator[bytes]:
        match kind(message):
            case "open":
                self._epoch = 0
            case "step":
                self._epoch = max(self._epoch, message.step.epoch)
            case "result":
                self.count += message.result.epoch < self._epoch
        yield message.SerializeToString()


@pytest.mark.parametrize("mode", MODES)
async def test_results_that_come_after_newer_steps_change_nothing(
    tiny_llama: Path, drafters: dict[str, str], want: Want, mode: str
) -> None:
    late = LateResults()
    async with pair(mode, tiny_llama, drafters, want, "100mbit,20ms,10ms", late, WIDE) as both:
        for number in range(1, 9):  # whether one comes late is chance
            await both.check_exact(ask(number % len(PROMPTS)))
            if late.count:
                break
        assert late.count > 0
        await both.check_exact(*three())


class Swapped:
    """Lets two Results of rounds under way change places, once, from the fourth on."""

    def __init__(self) -> None:
        self.kept: bytes | None = None
        self.done = False
        self._asked = self._answered = 0

    def __call__(self, message: Message) -> Iterator[bytes]:
        data = message.SerializeToString()
        match kind(message):
            case "step":
                self._asked += not message.step.more
            case "result":
                self._answered += 1
                if self.kept is not None:
                    yield data
                    data, self.kept = self.kept, None
                elif not self.done and 3 < self._answered < self._asked:
                    self.kept, self.done = data, True
                    return
        yield data


@pytest.mark.parametrize("mode", MODES)
async def test_results_in_the_wrong_order_end_the_request_with_the_reason(
    tiny_llama: Path, drafters: dict[str, str], want: Want, mode: str
) -> None:
    """TCP keeps the order; a cloud or a proxy that does not is broken, and no text is made of what it says."""
    swapped = Swapped()
    async with pair(mode, tiny_llama, drafters, want, LINK, swapped, WIDE) as both:
        got, error = await both.told(request := ask())
        assert swapped.done
        assert isinstance(error, CloudRefused)
        assert re.search(r"answered epoch \d+, start_pos \d+, n \d+, but the oldest Step is", str(error))
        assert got == both.want(request)[: len(got)]
        assert request.stats.finish_reason == "error"
        await both.nothing_is_left()
        await both.check_exact(ask(3))


def states(n: int) -> torch.Tensor:
    return torch.zeros(n, WIDTH)


@pytest.mark.parametrize("stale", [False, True])
async def test_a_late_result_of_an_old_epoch_is_dropped(stale: bool) -> None:
    """What the cloud computed of it before the rollback came is not taken for the text."""
    async with raw_session() as (session, cloud):
        futures = [
            session.submit(0, states(6), LAST),
            session.submit(6, states(3), ALL),
            session.submit(9, states(3), ALL),
        ]
        first, second, third = [await cloud.steps.get() for _ in futures]
        cloud.answer(first)
        cloud.answer(second, 2.0)
        assert (await futures[1]).deep is not None
        session.rollback(7)
        assert futures[2].cancelled()
        newer = session.submit(7, states(2), ALL)
        step = await cloud.steps.get()
        assert (step.epoch, step.start_pos) == (1, 7)
        cloud.answer(third, 9.0, stale=stale)
        while session.unanswered > 1:
            await asyncio.sleep(0.001)
        assert not newer.done()
        assert session.committed == 7
        cloud.answer(step, 3.0)
        deep = (await newer).deep
        assert deep is not None
        assert deep.eq(3.0).all()
        assert session.committed == 9


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ((1, 0), "answered epoch 0, start_pos 9, n 3, but the oldest Step is epoch 0, start_pos 6, n 3"),
        ((0, 0), "answered epoch 0, start_pos 6, n 3, but the oldest Step is epoch 0, start_pos 9, n 3"),
        ((0, 2), "answered epoch 1, start_pos 6, n 2, but the oldest Step is epoch 0, start_pos 9, n 3"),
        ((0, 1, 2, 1), "sent a Result that no Step asked for"),
    ],
)
async def test_results_out_of_order_end_the_session(order: tuple[int, ...], text: str) -> None:
    """Two rounds, the second of which is dropped, and one of the next epoch."""
    async with raw_session() as (session, cloud):
        prompt = session.submit(0, states(6), LAST)
        cloud.answer(await cloud.steps.get())
        await prompt
        futures = [session.submit(6, states(3), ALL), session.submit(9, states(3), ALL)]
        steps = [await cloud.steps.get() for _ in futures]
        session.rollback(6)
        futures.append(session.submit(6, states(2), ALL))
        steps.append(await cloud.steps.get())
        for index in (*order, 0, 0):  # the last ones are never read
            cloud.answer(steps[index])
        await cloud.left.wait()
        assert isinstance(session.error, CloudRefused)
        assert re.search(text, str(session.error))
        assert not session.alive
        assert session.unanswered == 0
        assert session not in session.link.sessions
        assert all(future.done() for future in futures)
        # Those of the device: reading, writing, and gRPC's own.
        while any(name.startswith(("CloudSession.", "_AioCall.")) for name in running_tasks()):
            await asyncio.sleep(0.001)


RANDOM_FAULTS = 20
"""Of each mode."""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
async def test_random_faults(tiny_llama: Path, drafters: dict[str, str], want: Want, mode: str) -> None:
    """Any fault at any moment of one to three answers, new ones and later turns: exact, and no leak."""
    tally: Counter[str] = Counter()
    async with pair(mode, tiny_llama, drafters, want) as both:
        for number in range(RANDOM_FAULTS):
            rng = random.Random(f"{mode} {number}")
            both.generator.policy.config = rng.choice((HAT, WIDE))
            requests = [
                GenerationRequest(prompt, 48, rng.choice(SAMPLINGS), chunk_tokens=CHUNK)
                for prompt in rng.sample(TRAINED_ON, rng.randint(1, 3))
            ]
            if rng.random() < 0.5:  # a later turn
                request = requests[0]
                said = await both.ids(request)
                assert said == both.want(request)
                requests[0] = replace(
                    request, prompt_ids=[*request.prompt_ids, *said, 7, 9], stats=GenerationStats()
                )
            fault, after_s = rng.choice(("stall", "cut", "cut", "stall, cut", "slow")), rng.uniform(0, 0.6)
            answers = asyncio.gather(*map(both.told, requests))
            await asyncio.wait([answers], timeout=after_s)
            deepest = both.deepest
            if "stall" in fault:
                both.link.stall(rng.uniform(0.1, 2.0))
            if fault == "stall, cut":
                await asyncio.sleep(rng.uniform(0, 0.5))
            if "cut" in fault:
                both.link.cut()
            if fault == "slow":
                both.link.set_link(LinkSpec.parse("500kbit,150ms,50ms"))
            for request, result in zip(requests, await answers, strict=True):
                assert result == (both.want(request), None)
                tally["exact"] += 1
                tally["resumes"] += request.stats.resumes
            both.link.set_link(LinkSpec.parse(LINK))
            await both.nothing_is_left()
            await both.check_exact(ask(rng.randrange(4), rng.choice(SAMPLINGS)))
            tally[fault] += 1
            tally[f"{min(deepest, 3)} in flight"] += 1
    print(f"{mode}: {RANDOM_FAULTS} faults: {dict(sorted(tally.items()))}")
    assert tally["resumes"]
