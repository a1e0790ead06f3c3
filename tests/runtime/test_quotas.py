"""Limits of tenants and devices in a real cloud: they refuse, delay and release, and nobody else is touched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from hat_runtime.cloud import quotas as cloud_quotas
from hat_runtime.cloud.engine import EngineConfig
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.errors import UsageError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from tests.runtime.raw_client import RawSession, channel_to, open_session, opening, states


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(3)) * 0.1


@asynccontextmanager
async def cloud_with(
    model: Path, folder: Path | None = None, limits: Any = None, batch: int = 64, **fields: Any
) -> AsyncIterator[tuple[RunningCloud, rpc.RuntimeStub]]:
    """A cloud, with a quota file if there are limits."""
    if limits is not None:
        assert folder is not None
        write(folder, limits)
        fields["quotas_file"] = folder / "quotas.yaml"
    scheduler = SchedulerConfig(max_batch_tokens=batch, idle_after_s=fields.pop("idle_after_s", 60.0))
    settings = {"input_layers": 2, "dtype": "float32", "kv_pages": 400, "page_tokens": 4, "drain_s": 0.1}
    config = CloudConfig(model, engine=EngineConfig(scheduler, threads=1), **(settings | fields))
    async with running_cloud(config) as cloud, channel_to(cloud) as stub:
        yield cloud, stub
        await all_back(cloud)


def write(folder: Path, limits: Any) -> None:
    (folder / "quotas.yaml").write_text(json.dumps(limits))


async def all_back(cloud: RunningCloud) -> None:
    """Once its streams are gone nothing is left of them."""
    registry = cloud.metrics.registry
    cache = cloud.engine.runner.cache
    assert registry.get_sample_value("hat_num_sessions_queued") == 0
    await cloud.engine.idle()
    open_sessions = registry.get_sample_value("hat_num_sessions_open")
    assert open_sessions or cache.free_pages == cache.num_pages


async def closed(cloud: RunningCloud, *sessions: RawSession) -> None:
    for session in sessions:
        await session.call.done_writing()
        assert (await session.end())[0] is grpc.StatusCode.OK
    while cloud.metrics.registry.get_sample_value("hat_num_sessions_open"):
        await asyncio.sleep(0.01)


async def refused(stub: rpc.RuntimeStub, cloud: RunningCloud, **fields: Any) -> tuple[str, float]:
    """The text of a refusal, and the seconds after which to come back."""
    session = RawSession(stub.Session())
    await session.send(opening(cloud, **fields))
    code, text = await session.end()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, text
    metadata = dict(await session.call.trailing_metadata())
    return text, int(metadata["grpc-retry-pushback-ms"]) / 1e3


def refusals(cloud: RunningCloud, reason: str) -> float | None:
    return cloud.metrics.registry.get_sample_value("hat_sessions_refused_total", {"reason": reason})


async def queued(cloud: RunningCloud, number: int) -> None:
    """Wait until so many wait for a place."""
    while cloud.metrics.registry.get_sample_value("hat_num_sessions_queued") != number:
        await asyncio.sleep(0.01)


async def decode(session: RawSession, start: int, steps: int) -> int:
    for position in range(start, start + steps):
        await session.step(position, rows(1), pb.WANT_ALL)
        await session.result()
    return start + steps


async def test_a_tenant_s_and_a_device_s_sessions_are_counted_and_released(
    tiny_llama: Path, tmp_path: Path
) -> None:
    limits = {"tenants": {"acme": {"sessions": 2}}, "devices": {"one": {"sessions": 1}}}
    async with cloud_with(tiny_llama, tmp_path, limits) as (cloud, stub):
        first = await open_session(stub, cloud, tenant="acme", device="one")
        text, retry_s = await refused(stub, cloud, tenant="acme", device="one")
        assert "device 'one' has all sessions that its quota sessions=1 gives" in text
        assert retry_s >= 1
        second = await open_session(stub, cloud, tenant="acme", device="two")
        text, _ = await refused(stub, cloud, tenant="acme", device="three")
        assert "tenant 'acme' has all sessions that its quota sessions=2 gives" in text
        other = await open_session(stub, cloud, tenant="other", device="one")
        registry = cloud.metrics.registry
        for tenant, held in (("acme", 2), ("other", 1)):
            assert registry.get_sample_value("hat_tenant_sessions_open", {"tenant": tenant}) == held
        await closed_one(first)
        again = await open_session(stub, cloud, tenant="acme", device="one")
        await decode(again, 0, 3)
        await cloud.engine.idle()  # a pass is counted after its answers have left
        assert registry.get_sample_value("hat_tenant_tokens_computed_total", {"tenant": "acme"}) == 3
        assert refusals(cloud, "tenant_sessions") == refusals(cloud, "device_sessions") == 1
        await closed(cloud, second, other, again)


async def closed_one(session: RawSession) -> None:
    await session.call.done_writing()
    await session.end()


async def test_an_idle_session_of_the_same_tenant_makes_room(tiny_llama: Path, tmp_path: Path) -> None:
    limits = {"tenant_default": {"sessions": 1}}
    async with cloud_with(tiny_llama, tmp_path, limits, idle_after_s=0.0) as (cloud, stub):
        foreign = await open_session(stub, cloud, tenant="b")
        idle = await open_session(stub, cloud, tenant="a")
        await decode(idle, 0, 1)
        fresh = await open_session(stub, cloud, tenant="a")
        code, text = await idle.end()
        assert (code, "to make room" in text) == (grpc.StatusCode.ABORTED, True)
        await decode(fresh, 0, 1), await decode(foreign, 0, 1)
        await closed(cloud, fresh, foreign)


async def test_limits_change_with_the_file_and_a_wrong_one_changes_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cloud_quotas, "EVERY_S", 0.02)
    async with cloud_with(tiny_llama, tmp_path, {"tenant_default": {"sessions": 0}}) as (cloud, stub):
        assert "sessions=0" in (await refused(stub, cloud))[0]
        (tmp_path / "quotas.yaml").write_text("tenant_default: {sessions: many}")
        while "tenant_default.sessions: 'many'" not in caplog.text:
            await asyncio.sleep(0.02)
        assert "sessions=0" in (await refused(stub, cloud))[0]
        (tmp_path / "quotas.yaml").write_text("since: 2026-11-31")  # no YAMLError
        while "day is out of range" not in caplog.text:
            await asyncio.sleep(0.02)
        write(tmp_path, {})
        while True:
            session = RawSession(stub.Session())
            await session.send(opening(cloud))
            try:
                if await session.call.read() is not grpc.aio.EOF:
                    break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
        await closed(cloud, session)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tenants: [", "must be YAML or JSON: line 1"),
        ("tenants: {a: {kv_share: 2}}", "tenants.a.kv_share: 2"),
        (b"\xff\xfe\x00", "must be YAML or JSON"),
        (None, "No such file"),
        ("x" * (1 << 20) + "x", "is too long"),
    ],
)
async def test_a_cloud_does_not_start_with_a_wrong_file(
    tiny_llama: Path, tmp_path: Path, text: str | bytes | None, says: str
) -> None:
    file = tmp_path / "quotas.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=r"^--quotas /") as wrong:
        async with running_cloud(CloudConfig(tiny_llama, input_layers=2, quotas_file=file)):
            pass
    assert says in str(wrong.value)


async def test_many_sessions_of_one_tenant_get_no_more_rows_than_one_of_another(tiny_llama: Path) -> None:
    """Rows are counted, not time: while both want all there is, each has half."""
    got, wanted = {"greedy": 0, "modest": 0}, 240
    async with cloud_with(tiny_llama, batch=16, kv_pages=1000) as (cloud, stub):
        saw_rows = cloud.metrics.saw_rows

        def count(tenant: str, computed: int) -> None:
            """In the engine's thread, from the modest tenant's first row to its last."""
            saw_rows(tenant, computed)
            if tenant == "modest" or 0 < got["modest"] < wanted:
                got[tenant] += computed

        cloud.metrics.saw_rows = count  # type: ignore[method-assign]
        many = [await open_session(stub, cloud, tenant="greedy") for _ in range(8)]
        one = await open_session(stub, cloud, tenant="modest")

        async def upload(session: RawSession) -> None:
            """Prompt after prompt, the next ones sent before the first is done."""
            for _ in range(4):
                await session.step(0, rows(60), pb.WANT_NONE)
            while True:
                await session.result()
                await session.step(0, rows(60), pb.WANT_NONE)

        tasks = [asyncio.create_task(upload(session)) for session in many]
        registry = cloud.metrics.registry
        while not registry.get_sample_value("hat_tokens_computed_total", {"kind": "prefill"}):
            await asyncio.sleep(0.005)
        for _ in range(wanted // 60):
            await one.step(0, rows(60), pb.WANT_NONE)
        for _ in range(wanted // 60):
            await one.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in many:
            session.call.cancel()
        await closed(cloud, one)
    assert got["modest"] == wanted
    assert wanted / 2 < got["greedy"] <= 1.25 * wanted


async def test_a_tenant_over_its_rate_waits_and_others_do_not(tiny_llama: Path, tmp_path: Path) -> None:
    limits = {"tenants": {"slow": {"tokens_per_second": 20, "burst_tokens": 20}}}
    async with cloud_with(tiny_llama, tmp_path, limits) as (cloud, stub):
        slow = await open_session(stub, cloud, tenant="slow")
        free = await open_session(stub, cloud, tenant="free")
        await slow.step(0, rows(30), pb.WANT_LAST)
        deep = states(await slow.result())
        await slow.step(30, rows(1), pb.WANT_ALL)  # it owes something: this one waits
        waiting = asyncio.create_task(slow.result())
        await decode(free, 0, 4)
        result = await waiting
        assert result.status == pb.STATUS_OK
        assert result.queue_us > 100_000  # the rate is kept: by the cloud's own clock it was in debt
        await free.step(4, rows(30), pb.WANT_LAST)
        assert states(await free.result()).shape == deep.shape
        await closed(cloud, slow, free)


async def test_a_session_is_no_longer_than_its_tenant_s_share_of_the_cache(
    tiny_llama: Path, tmp_path: Path
) -> None:
    async with cloud_with(tiny_llama, tmp_path, {"tenant_default": {"kv_share": 0.1}}) as (cloud, stub):
        session = RawSession(stub.Session())
        await session.send(opening(cloud))
        assert (await session.call.read()).opened.limits.max_tokens == 160
        await session.step(0, rows(161), pb.WANT_LAST)
        code, text = await session.end()
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert "160 tokens" in text


async def test_who_may_wait_gets_the_place_that_becomes_free(tiny_llama: Path) -> None:
    async with cloud_with(tiny_llama, max_sessions=1, max_waiting=2) as (cloud, stub):
        first = await open_session(stub, cloud)
        line = [asyncio.create_task(open_session(stub, cloud, deadline_ms=60_000)) for _ in range(2)]
        await queued(cloud, 2)
        text, _ = await refused(stub, cloud, deadline_ms=60_000)  # the line is full
        assert "all 1 sessions are busy; try again in" in text
        await refused(stub, cloud)  # does not want to wait
        await closed_one(first)
        done, _ = await asyncio.wait(line, return_when=asyncio.FIRST_COMPLETED)
        (second,) = (task.result() for task in done)
        await decode(second, 0, 1)
        await closed_one(second)
        third = await next(task for task in line if task not in done)
        await closed(cloud, third)
        assert refusals(cloud, "sessions") == 2


async def test_waiting_ends_with_the_deadline_or_the_device(tiny_llama: Path) -> None:
    async with cloud_with(tiny_llama, max_sessions=1, max_waiting=4) as (cloud, stub):
        first = await open_session(stub, cloud)
        await refused(stub, cloud, deadline_ms=50)
        assert refusals(cloud, "deadline") == 1
        gone = RawSession(stub.Session())
        await gone.send(opening(cloud, deadline_ms=60_000))
        await queued(cloud, 1)
        gone.call.cancel()
        await queued(cloud, 0)
        await closed(cloud, first)
        await closed(cloud, await open_session(stub, cloud))


async def test_a_cloud_that_drains_sends_the_line_away(tiny_llama: Path) -> None:
    async with AsyncExitStack() as stack:
        config = CloudConfig(
            tiny_llama,
            input_layers=2,
            dtype="float32",
            kv_pages=64,
            max_sessions=1,
            max_waiting=1,
            drain_s=0.1,
        )
        serving = running_cloud(config)
        cloud = await serving.__aenter__()
        stub = await stack.enter_async_context(channel_to(cloud))
        await open_session(stub, cloud)
        waiting = RawSession(stub.Session())
        await waiting.send(opening(cloud, deadline_ms=60_000))
        await queued(cloud, 1)
        await serving.__aexit__(None, None, None)
        assert await waiting.end() == (grpc.StatusCode.UNAVAILABLE, "this replica is going away")


async def test_the_line_is_shared_between_tenants(tiny_llama: Path) -> None:
    """Who has many places in it gives one up, and who has fewer sessions goes first."""
    async with cloud_with(tiny_llama, max_sessions=2, max_waiting=3) as (cloud, stub):
        held = [await open_session(stub, cloud, tenant="greedy") for _ in range(2)]
        greedy = []
        for number in range(3):
            greedy.append(RawSession(stub.Session()))
            await greedy[-1].send(opening(cloud, tenant="greedy", deadline_ms=60_000))
            await queued(cloud, number + 1)
        modest = asyncio.create_task(open_session(stub, cloud, tenant="modest", deadline_ms=60_000))
        assert (await greedy[-1].end())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED, "the last one gives way"
        assert refusals(cloud, "line") == 1
        await closed_one(held[0])
        session = await modest
        await decode(session, 0, 1)
        assert cloud.metrics.registry.get_sample_value("hat_num_sessions_queued") == 2
        for waiting in greedy[:2]:
            waiting.call.cancel()
        await closed(cloud, held[1], session)


async def test_nobody_is_let_in_who_would_slow_others_down(tiny_llama: Path) -> None:
    """A target that no pass can keep: the first session may talk, no other."""
    async with cloud_with(tiny_llama, tbt_target_s=1e-6) as (cloud, stub):
        first = await open_session(stub, cloud)
        await decode(first, 0, 3)
        text, retry_s = await refused(stub, cloud)
        assert "beyond the target of 0 ms (--tbt-target-ms)" in text
        assert retry_s >= 1
        assert refusals(cloud, "tbt_target") == 1
        await closed(cloud, first)
        second = await open_session(stub, cloud)
        await closed(cloud, second)


async def test_a_tenant_that_was_refused_gets_the_next_place_before_one_that_has_more(
    tiny_llama: Path,
) -> None:
    async with cloud_with(tiny_llama, max_sessions=2) as (cloud, stub):
        greedy = [await open_session(stub, cloud, tenant="greedy") for _ in range(2)]
        text, _ = await refused(stub, cloud, tenant="modest")
        assert "all 2 sessions are busy; try again" in text
        await closed_one(greedy[0])
        text, _ = await refused(stub, cloud, tenant="greedy")
        assert "all 2 sessions are busy or kept for 1 other tenants" in text
        modest = await open_session(stub, cloud, tenant="modest")
        await closed_one(greedy[1])
        again = await open_session(stub, cloud, tenant="greedy")  # the claim is gone
        await closed(cloud, modest, again)


async def test_a_kept_place_is_also_one_that_meets_the_target(tiny_llama: Path) -> None:
    async with cloud_with(tiny_llama, tbt_target_s=1e-6) as (cloud, stub):
        first = await open_session(stub, cloud, tenant="greedy")
        await decode(first, 0, 3)
        await refused(stub, cloud, tenant="modest")
        await closed(cloud, first)
        text, _ = await refused(stub, cloud, tenant="greedy")
        assert "0 sessions talk, 1 places are kept for tenants that were refused before" in text
        modest = await open_session(stub, cloud, tenant="modest")
        await closed(cloud, modest)
