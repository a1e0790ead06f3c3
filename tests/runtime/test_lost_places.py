"""Places of sessions that lose their streams: a session counts once from its opening to its end, whichever streams it
has; nobody gets in beyond a limit by a resume, and no resume is refused because somebody else came meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from hat_runtime.cloud.engine import EngineConfig
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.spiffe import DEVICE
from tests.certificates import Site
from tests.runtime.raw_client import RawSession, all_pages_back, channel_to, open_session, opening
from tests.runtime.secured import admin, channel_as, secured_cloud

ROWS = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)) * 0.1
FULL, GONE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.NOT_FOUND


@asynccontextmanager
async def cloud_with(
    model: Path, quotas: Path | None = None, idle_after_s: float = 60.0, **fields: Any
) -> AsyncIterator[tuple[RunningCloud, rpc.RuntimeStub]]:
    """A cloud where tenant "a" may have one session, if there is a folder for the quota file."""
    if quotas is not None:
        fields["quotas_file"] = quotas / "quotas.yaml"
        fields["quotas_file"].write_text(json.dumps({"tenants": {"a": {"sessions": 1}}}))
    engine = EngineConfig(SchedulerConfig(idle_after_s=idle_after_s), threads=1)
    settings = {"input_layers": 2, "dtype": "float32", "kv_pages": 64, "page_tokens": 4, "drain_s": 0.1}
    config = CloudConfig(model, engine=engine, **(settings | fields))
    async with running_cloud(config) as cloud, channel_to(cloud) as stub:
        yield cloud, stub
        await until(cloud, "hat_num_sessions_open", 0)
        await all_pages_back(cloud)


async def opened(stub: rpc.RuntimeStub, cloud: RunningCloud, **fields: Any) -> tuple[RawSession, str]:
    """A session that outlives its stream, with a text."""
    session = RawSession(stub.Session())
    await session.send(opening(cloud, resumable=True, **fields))
    message = await session.call.read()
    assert message is not grpc.aio.EOF, (await session.call.code(), await session.call.details())
    await session.step(message.opened.committed, ROWS[:4], pb.WANT_ALL)
    assert (await session.result()).status == pb.STATUS_OK
    return session, message.opened.session_id


async def resumed(stub: rpc.RuntimeStub, cloud: RunningCloud, session_id: str, **fields: Any) -> RawSession:
    return (await opened(stub, cloud, resume=pb.Resume(session_id=session_id), **fields))[0]


async def refusal(stub: rpc.RuntimeStub, cloud: RunningCloud, **fields: Any) -> tuple[grpc.StatusCode, str]:
    session = RawSession(stub.Session())
    await session.send(opening(cloud, **({"resumable": True} | fields)))
    return await session.end()


async def close(session: RawSession) -> None:
    await session.send(pb.DeviceMessage(close=pb.Close()))
    assert (await session.end())[0] is grpc.StatusCode.OK


async def end(session: RawSession) -> None:
    await session.call.done_writing()
    assert (await session.end())[0] is grpc.StatusCode.OK


async def lose(cloud: RunningCloud, session: RawSession, lost: int = 1) -> None:
    session.call.cancel()
    await until(cloud, "hat_num_sessions_lost", lost)


async def until(cloud: RunningCloud, name: str, value: float, **labels: str) -> None:
    async with asyncio.timeout(20):
        while cloud.metrics.registry.get_sample_value(name, labels) != value:
            await asyncio.sleep(0.01)


def held(cloud: RunningCloud) -> float | None:
    return cloud.metrics.registry.get_sample_value("hat_tenant_sessions_open", {"tenant": "a"})


async def test_a_resumed_session_counts_once_and_frees_its_place_at_its_end(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """While it is lost, after a resume and after another one of a stream that lives; then one may come, and no two."""
    async with cloud_with(tiny_llama, tmp_path) as (cloud, stub):
        first, session_id = await opened(stub, cloud, tenant="a")

        async def nobody_else() -> None:
            code, text = await refusal(stub, cloud, tenant="a")
            assert code is FULL
            assert "quota sessions=1" in text
            assert held(cloud) == 1

        await lose(cloud, first)
        await nobody_else()
        second = await resumed(stub, cloud, session_id, tenant="a")
        await nobody_else()
        third = await resumed(stub, cloud, session_id, tenant="a")
        assert (await second.end())[0] is grpc.StatusCode.ABORTED
        await nobody_else()
        await third.step(8, ROWS[:1], pb.WANT_ALL)
        assert (await third.result()).status == pb.STATUS_OK
        await close(third)
        await until(cloud, "hat_tenant_sessions_open", 0, tenant="a")
        next_one, _ = await opened(stub, cloud, tenant="a")
        await nobody_else()
        await close(next_one)


async def test_whoever_waits_gets_in_after_a_resumed_session_and_not_before(tiny_llama: Path) -> None:
    async with cloud_with(tiny_llama, max_sessions=1, max_waiting=1) as (cloud, stub):
        first, session_id = await opened(stub, cloud)
        await lose(cloud, first)
        waiting = asyncio.create_task(open_session(stub, cloud, deadline_ms=60_000))
        await until(cloud, "hat_num_sessions_queued", 1)
        again = await resumed(stub, cloud, session_id)
        assert not waiting.done()
        await close(again)
        await end(await waiting)


async def test_a_lost_session_s_place_is_free_when_its_time_is_over(tiny_llama: Path) -> None:
    """For one of those that wait, and no more."""
    async with cloud_with(tiny_llama, max_sessions=1, max_waiting=2, resume_ttl_s=0.2) as (cloud, stub):
        lost, session_id = await opened(stub, cloud)
        line = [asyncio.create_task(open_session(stub, cloud, deadline_ms=60_000)) for _ in range(2)]
        await until(cloud, "hat_num_sessions_queued", 2)
        lost.call.cancel()
        done, rest = await asyncio.wait(line, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(rest)) == (1, 1)
        assert (await refusal(stub, cloud, resume=pb.Resume(session_id=session_id)))[0] is GONE
        await until(cloud, "hat_num_sessions_queued", 1)
        await end(await done.pop())
        await end(await rest.pop())


async def test_of_idle_sessions_those_without_a_stream_make_room_first(tiny_llama: Path) -> None:
    async with cloud_with(tiny_llama, max_sessions=2, idle_after_s=0.0) as (cloud, stub):
        kept, _ = await opened(stub, cloud)
        lost, session_id = await opened(stub, cloud)  # active after the other one
        await lose(cloud, lost)
        fresh, _ = await opened(stub, cloud)
        assert (await refusal(stub, cloud, resume=pb.Resume(session_id=session_id)))[0] is GONE
        await until(cloud, "hat_num_sessions_lost", 0)
        for session in (kept, fresh):
            await session.step(4, ROWS[:1], pb.WANT_ALL)
            assert (await session.result()).status == pb.STATUS_OK
            await close(session)


async def test_a_session_that_made_room_cannot_be_resumed(tiny_llama: Path) -> None:
    """Its device has not read the end of its stream yet, but its place is somebody else's."""
    async with cloud_with(tiny_llama, max_sessions=1, idle_after_s=0.0) as (cloud, stub):
        idle, session_id = await opened(stub, cloud)
        fresh, _ = await opened(stub, cloud)
        assert (await refusal(stub, cloud, resume=pb.Resume(session_id=session_id)))[0] is GONE
        assert (await idle.end())[0] is grpc.StatusCode.ABORTED
        await close(fresh)


async def test_a_denied_device_s_lost_session_ends(tiny_llama: Path, tmp_path: Path) -> None:
    """With its place; that of another device stays."""
    site = Site(tmp_path)
    one, other, operator = site.device(), site.device("jetson-2"), site.operator()
    name = str(TlsFolder(one, DEVICE).current().identity)
    async with (
        secured_cloud(tiny_llama, site, max_sessions=2) as cloud,
        channel_as(cloud, one) as stub,
        channel_as(cloud, other) as other_stub,
    ):
        denied, _ = await opened(stub, cloud)
        kept, session_id = await opened(other_stub, cloud)
        await lose(cloud, denied)
        await lose(cloud, kept, 2)
        await admin(cloud, "/v1/denied", operator, {"version": 1, "denied": [name]})
        await until(cloud, "hat_num_sessions_lost", 1)
        assert (await refusal(stub, cloud))[0] is grpc.StatusCode.PERMISSION_DENIED
        fresh, _ = await opened(other_stub, cloud)
        again = await resumed(other_stub, cloud, session_id)
        await close(fresh), await close(again)
        await until(cloud, "hat_kv_cache_usage_ratio", 0)
