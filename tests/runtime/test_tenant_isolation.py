"""What one tenant leaves behind for another: nothing in the KV pages, nothing in what a prompt costs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.benchmark_modules
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.model.pages import KvCache, PagedSequence
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.raw_client import RawSession, all_pages_back, channel_to, open_session

assert tests.benchmark_modules
from shared_prefixes import CountingRunner, SharingRunner, auc  # noqa: E402

PROBES = 24
PREFIX = 40


def config(folder: Path, **fields: Any) -> CloudConfig:
    small: dict[str, Any] = {"input_layers": 2, "dtype": "float32", "kv_bytes": 4 << 20, "drain_s": 0.1}
    return CloudConfig(folder, **(small | fields))


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))


async def send(session: RawSession, start: int, hidden: torch.Tensor, epoch: int = 0) -> pb.Result:
    await session.step(start, hidden, pb.WANT_LAST, epoch=epoch)
    return await session.result()


class Watch:
    """Looks at every page at the moment when it is given to a session."""

    def __init__(self, cache: KvCache) -> None:
        self.given: list[int] = []
        self.dirty: list[int] = []
        self._cache = cache
        self._reserve: Callable[[PagedSequence, int], None] = cache.reserve
        cache.reserve = self.reserve  # type: ignore[method-assign]

    def reserve(self, sequence: PagedSequence, total_tokens: int) -> None:
        before = len(sequence.pages)
        self._reserve(sequence, total_tokens)
        for page in sequence.pages[before:]:
            self.given.append(page)
            slots = slice(page * self._cache.page_tokens, (page + 1) * self._cache.page_tokens)
            if self._cache.keys[:, slots].any() or self._cache.values[:, slots].any():
                self.dirty.append(page)

    @property
    def reused(self) -> int:
        """Times that a page was given that had an owner before."""
        return len(self.given) - len(set(self.given))


async def traffic(cloud: RunningCloud) -> None:
    """Sessions of three tenants that grow, roll back, are evicted by each other, end well and break off."""
    rng = random.Random(7)
    async with channel_to(cloud) as stub:
        for turn in range(12):
            sessions = [await open_session(stub, cloud, tenant=f"tenant-{i}") for i in range(3)]
            for session in sessions:
                await send(session, 0, rows(rng.randint(1, 30), rng.randint(0, 999)))
                await send(session, 0, rows(rng.randint(1, 30), turn), epoch=1)  # a rollback to the start
            for session in sessions[:2]:
                await session.call.done_writing()
                await session.end()
            sessions[2].call.cancel()
        await cloud.engine.idle()


async def test_every_page_is_empty_when_it_is_given_to_a_session(tiny_llama: Path) -> None:
    async with running_cloud(config(tiny_llama, kv_bytes=None, kv_pages=12, page_tokens=8)) as cloud:
        cache = cloud.engine.runner.cache
        watch = Watch(cache)
        await traffic(cloud)
        assert watch.reused > 50
        assert watch.dirty == []
        await all_pages_back(cloud)
        assert not cache.keys.any()
        assert not cache.values.any()


async def test_pages_that_are_not_zeroed_are_found(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(KvCache, "_zero", lambda self, pages: None)
    async with running_cloud(config(tiny_llama, kv_bytes=None, kv_pages=12, page_tokens=8)) as cloud:
        watch = Watch(cloud.engine.runner.cache)
        await traffic(cloud)
        assert len(watch.dirty) > 50


@pytest.mark.parametrize(("runner", "expected"), [(CountingRunner, 0.5), (SharingRunner, 1.0)])
async def test_what_a_prompt_costs_tells_nothing_of_other_tenants_prompts(
    tiny_llama: Path, runner: type[CountingRunner], expected: float
) -> None:
    """Rows computed for prompts that another tenant has just sent, and for others: alike, but in a shared cache."""
    async with running_cloud(config(tiny_llama)) as cloud, channel_to(cloud) as stub:
        cloud.engine.runner = counting = runner(cloud.engine.runner)
        victim = await open_session(stub, cloud, tenant="victim")
        new, known = [], []
        for probe in range(PROBES):
            secret = rows(PREFIX, probe)
            await send(victim, 0, secret, epoch=probe)
            for hidden, counts in ((secret, known), (rows(PREFIX, 1000 + probe), new)):
                before = counting.rows
                prober = await open_session(stub, cloud, tenant="prober")
                await send(prober, 0, hidden)
                counts.append(counting.rows - before)
                await prober.call.done_writing()
                await prober.end()
        assert auc(new, known) == expected
        assert set(new) == {PREFIX}
        await cloud.engine.idle()


def test_auc_tells_groups_apart_or_does_not() -> None:
    assert auc([2, 3], [0, 1]) == 1
    assert auc([0, 1], [2, 3]) == 0
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([0, 2], [1]) == 0.5
