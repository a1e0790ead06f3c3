"""Drafts change nothing but the time: whatever drafts, however far, over whatever link."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import cycle, product
from pathlib import Path

import pytest

from hat_runtime.cloud import server
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.sampling import SamplingParams
from tests.runtime.speculating import speculating
from tests.runtime.test_generator import Reference, answer, ask, ids, make_prompts

DRAFTERS = ("ngram", "adapter", "feature", "hybrid", "model")
WINDOWS = (1, 2, None)
BRANCHES = (1, 3)
ALTERNATIVES = (0, 2, None)
SLOW = ("100mbit,20ms", "100mbit,100ms,5ms")


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


PROMPTS = make_prompts(5, seed=21, low=5, high=60)
NEW = 24


@pytest.fixture(scope="module")
def want(reference: Reference) -> list[list[int]]:
    return [reference.greedy(prompt, NEW) for prompt in PROMPTS]


async def check_texts(
    model: Path,
    drafter: str,
    want: list[list[int]],
    grid: Iterable[tuple[int | None, int, int | None]],
    link: str,
) -> None:
    """Alone, and several at a time, for (window, branches, alternatives) of a grid."""
    for window, branches, alternatives in grid:
        config = DraftConfig(4, window=window, branches=branches, alternatives=alternatives, adaptive=False)
        async with speculating(model, drafter, config, link) as (generator, _):
            if not link:
                assert await answer(generator, PROMPTS[0], NEW) == want[0]
            together = [ask(generator, prompt, NEW) for prompt in PROMPTS]
            assert await asyncio.gather(*(ids(generator, r) for r in together)) == want
            assert sum(r.stats.draft_tokens for r in together) > 0


@pytest.mark.parametrize("link", ["", *SLOW])
@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_greedy_text_is_the_whole_models(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]], drafter: str, link: str
) -> None:
    """Windows and branches in all combinations on loopback; over slow links each of all once."""
    grid: Iterable[tuple[int | None, int, int | None]]
    if link:
        grid = zip(WINDOWS, (3, 1, 3), (None, 2, 0), strict=True)
    else:
        pairs = product(WINDOWS, BRANCHES)
        grid = ((*pair, others) for pair, others in zip(pairs, cycle((2, None, 0, 2)), strict=False))
    await check_texts(tiny_llama, drafters[drafter], want, grid, link)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("link", SLOW)
@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_greedy_text_over_the_whole_grid(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]], drafter: str, link: str
) -> None:
    await check_texts(tiny_llama, drafters[drafter], want, product(WINDOWS, BRANCHES, ALTERNATIVES), link)


@pytest.mark.parametrize("drafter", ["model", "feature", "hybrid"])
async def test_drafts_are_accepted(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]], drafter: str
) -> None:
    """Fewer rounds than tokens, and the accounts agree on both sides."""
    config = DraftConfig(4, window=1, adaptive=False)
    async with speculating(tiny_llama, drafters[drafter], config) as (generator, cloud):
        requests = [ask(generator, prompt, NEW) for prompt in PROMPTS]
        for request, text in zip(requests, want, strict=True):
            assert await ids(generator, request) == text
        accepted = sum(request.stats.accepted_tokens for request in requests)
        drafted = sum(request.stats.draft_tokens for request in requests)
        assert 0 < accepted < drafted
        rounds = sum(request.stats.rounds for request in requests)
        others = sum(request.stats.alternatives_accepted for request in requests)
        assert rounds < sum(map(len, want)) <= rounds + accepted + others
        sample = generator.metrics.registry.get_sample_value
        assert sample("hat_accepted_tokens_total") == accepted
        assert sample("hat_draft_tokens_total") == drafted
        assert sample("hat_alternatives_accepted_total") == others
        assert sample("hat_alternatives_total") == sum(request.stats.alternatives for request in requests)
        assert sample("hat_verify_rounds_total") == rounds
        assert cloud.metrics.registry.get_sample_value("hat_verify_passes_total") == rounds


@pytest.mark.parametrize(
    ("window", "branches", "ahead"),
    [(1, 0, set()), (1, 1, {"tail"}), (1, 3, {"tail", "branch"}), (4, 1, {"rounds", "tail"})],
)
async def test_window_and_branches_say_what_is_done_while_a_round_is_checked(
    tiny_llama: Path,
    drafters: dict[str, str],
    want: list[list[int]],
    window: int,
    branches: int,
    ahead: set[str],
) -> None:
    config = DraftConfig(4, window=window, branches=branches, adaptive=False)
    async with speculating(tiny_llama, drafters["model"], config, "100mbit,50ms") as (generator, _):
        for prompt, text in zip(PROMPTS, want, strict=True):
            assert await ids(generator, ask(generator, prompt, NEW)) == text
        sample = generator.metrics.registry.get_sample_value
        seen = {"rounds": sample("hat_rounds_ahead_total")} | {
            place: sample("hat_drafts_ahead_total", {"place": place}) for place in ("tail", "branch")
        }
    assert {name for name, count in seen.items() if count} == ahead


@pytest.mark.parametrize("link", ["", "100mbit,20ms"])
@pytest.mark.parametrize("drafter", ["model", "feature"])
async def test_a_right_alternative_gives_the_token_behind_it_as_well(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]], drafter: str, link: str
) -> None:
    rounds = {}
    for alternatives in (0, 3):
        config = DraftConfig(4, window=1, branches=0, alternatives=alternatives, adaptive=False)
        async with speculating(tiny_llama, drafters[drafter], config, link) as (generator, _):
            requests = [ask(generator, prompt, NEW) for prompt in PROMPTS]
            for request, text in zip(requests, want, strict=True):
                assert await ids(generator, request) == text
        stats = [request.stats for request in requests]
        right = sum(one.alternatives_accepted for one in stats)
        rounds[alternatives] = sum(one.rounds for one in stats)
        assert sum(one.alternatives for one in stats) >= right
        assert (right > 0) == (alternatives > 0)
        assert right <= sum(one.refusals for one in stats)
        # Each round gives its accepted drafts and one token, or an alternative and the token behind it.
        tokens = rounds[alternatives] + sum(one.accepted_tokens for one in stats) + right
        assert sum(map(len, want)) <= tokens <= sum(map(len, want)) + 5 * len(want)
    assert rounds[3] < rounds[0]


async def test_a_cloud_of_before_1_3_is_sent_no_alternatives(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PROTOCOL", (1, 2))
    config = DraftConfig(4, alternatives=3, adaptive=False)
    async with speculating(tiny_llama, drafters["model"], config) as (generator, _):
        request = ask(generator, PROMPTS[0], NEW)
        assert await ids(generator, request) == want[0]
        assert request.stats.draft_tokens > 0
        assert request.stats.alternatives == 0


async def test_the_model_as_its_own_drafter_is_always_right(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]]
) -> None:
    """Everything is accepted: a round of 4 drafts gives 5 tokens."""
    config = DraftConfig(4, stop_threshold=0.0, window=1, adaptive=False)
    async with speculating(tiny_llama, drafters["itself"], config) as (generator, _):
        request = ask(generator, PROMPTS[0], NEW)
        assert await ids(generator, request) == want[0]
        # The prompt's, then 4 drafts and what comes behind them, which may have been drafted as well.
        assert request.stats.rounds <= 6
        assert request.stats.accepted_tokens >= NEW - request.stats.rounds


@pytest.mark.parametrize("sampling", [SamplingParams(0.8, seed=11), SamplingParams(1.3, 0.8, seed=12)])
async def test_coupled_sampling_is_plain_seeded_sampling(
    tiny_llama: Path, drafters: dict[str, str], sampling: SamplingParams
) -> None:
    async with speculating(tiny_llama, "none", DraftConfig()) as (generator, _):
        plain = [await answer(generator, prompt, NEW, sampling=sampling) for prompt in PROMPTS[:3]]
    for drafter in (*DRAFTERS, "itself"):
        for config in (
            DraftConfig(4, window=1, alternatives=2),
            DraftConfig(3, branches=3, adaptive=False),
        ):
            async with speculating(tiny_llama, drafters[drafter], config, "100mbit,20ms") as (generator, _):
                requests = [ask(generator, prompt, NEW, sampling=sampling) for prompt in PROMPTS[:3]]
                assert await asyncio.gather(*(ids(generator, r) for r in requests)) == plain
                if drafter == "itself":
                    assert sum(r.stats.accepted_tokens for r in requests) > NEW


async def test_drafts_beyond_a_stop_token_are_not_part_of_the_text(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]]
) -> None:
    stop = want[0][9]
    config = DraftConfig(6, stop_threshold=0.0, adaptive=False)
    async with speculating(tiny_llama, drafters["itself"], config, "100mbit,20ms") as (generator, _):
        request = ask(generator, PROMPTS[0], NEW)
        request.stop_ids = frozenset({stop})
        assert await ids(generator, request) == want[0][: want[0].index(stop) + 1]
        assert request.stats.finish_reason == "stop"


@pytest.mark.parametrize("drafter", ["itself", "feature", "hybrid"])
async def test_the_second_turn_goes_on_behind_what_is_certain(
    tiny_llama: Path, drafters: dict[str, str], reference: Reference, drafter: str
) -> None:
    """What the caches hold of refused drafts is never taken for the text."""
    config = DraftConfig(6, stop_threshold=0.0, adaptive=False)
    async with speculating(tiny_llama, drafters[drafter], config, "100mbit,20ms") as (generator, _):
        text = list(PROMPTS[1])
        for turn in range(4):
            request = ask(generator, text, 9 + turn)
            said = await ids(generator, request)
            assert said == reference.greedy(text, 9 + turn)
            if turn:
                assert request.stats.cached_tokens > 0
            text += [*said, *make_prompts(1, seed=50 + turn, low=4, high=9)[0]]


async def test_a_cancelled_answer_leaves_a_conversation_that_can_go_on(
    tiny_llama: Path, drafters: dict[str, str], reference: Reference, want: list[list[int]]
) -> None:
    config = DraftConfig(6, stop_threshold=0.0, adaptive=False)
    async with speculating(tiny_llama, drafters["model"], config, "100mbit,20ms") as (generator, _):
        for count in (1, 4, 7):
            stream = generator.generate(ask(generator, PROMPTS[0], NEW))
            got = [(await anext(stream)).token_id for _ in range(count)]
            await stream.aclose()
            assert got == want[0][:count]
        assert await answer(generator, PROMPTS[0], NEW) == want[0]


async def test_drafts_give_way_when_the_device_is_full(
    tiny_llama: Path, drafters: dict[str, str], want: list[list[int]]
) -> None:
    """The KV cache holds the text and hardly more: the text comes all the same."""
    prompt, text = PROMPTS[0], want[0]
    config = DraftConfig(8, stop_threshold=0.0, adaptive=False)
    room = len(prompt) + len(text)
    async with speculating(tiny_llama, drafters["itself"], config, kv_tokens=-(-room // 4) * 4) as (g, _):
        assert await answer(g, prompt, NEW) == text
