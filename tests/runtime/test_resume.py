"""Sessions that outlive their streams, against a real server: who may take one over, what is left of it, and for how
long; what the engine does when a pass raises, and what a stream may hold in memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from hat_runtime.cloud import stream as stream_module
from hat_runtime.cloud.engine import EngineConfig
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from tests.runtime.raw_client import LocalSplit, RawSession, channel_to, opening, states

TEXT = torch.randint(3, 199, (90,), generator=torch.Generator().manual_seed(5))
NOT_FOUND, ABORTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> LocalSplit:
    return LocalSplit(tiny_llama)


def config(folder: Path, **fields: Any) -> CloudConfig:
    small: dict[str, Any] = {
        "input_layers": 2,
        "dtype": "float32",
        "kv_pages": 96,
        "page_tokens": 4,
        "drain_s": 0.2,
    }
    return CloudConfig(model=folder, **(small | fields))


@pytest.fixture
async def cloud(tiny_llama: Path) -> AsyncIterator[RunningCloud]:
    async with running_cloud(config(tiny_llama)) as running:
        yield running
        await running.engine.idle()


async def opened(stub: rpc.RuntimeStub, cloud: RunningCloud, **fields: Any) -> tuple[RawSession, pb.Opened]:
    """A session that outlives its stream."""
    session = RawSession(stub.Session())
    await session.send(opening(cloud, **({"resumable": True} | fields)))
    message = await session.call.read()
    assert message is not grpc.aio.EOF, (await session.call.code(), await session.call.details())
    return session, message.opened


async def resumed(
    stub: rpc.RuntimeStub, cloud: RunningCloud, session_id: str, **fields: Any
) -> tuple[RawSession, pb.Opened]:
    return await opened(stub, cloud, resume=pb.Resume(session_id=session_id), **fields)


async def refused(
    stub: rpc.RuntimeStub, cloud: RunningCloud, session_id: str, **fields: Any
) -> tuple[grpc.StatusCode, str]:
    session = RawSession(stub.Session())
    resume = pb.Resume(session_id=session_id)
    with contextlib.suppress(grpc.aio.AioRpcError):  # told by `end` as well
        await session.send(opening(cloud, **({"resumable": True, "resume": resume} | fields)))
    return await session.end()


async def close(session: RawSession) -> grpc.StatusCode:
    await session.send(pb.DeviceMessage(close=pb.Close()))
    return (await session.end())[0]


def sample(cloud: RunningCloud, name: str) -> float:
    value = cloud.metrics.registry.get_sample_value(name)
    assert value is not None
    return value


async def until(cloud: RunningCloud, name: str, value: float) -> None:
    async with asyncio.timeout(20):
        while sample(cloud, name) != value:
            await asyncio.sleep(0.01)


def close_to(result: pb.Result, deep: torch.Tensor) -> None:
    torch.testing.assert_close(states(result), deep, atol=1e-4, rtol=1e-4)


async def test_a_resume_goes_on_where_the_stream_was_lost(cloud: RunningCloud, local: LocalSplit) -> None:
    """Nothing of the text is sent again, and epochs begin anew; what was queued and not answered is of no effect."""
    shallow = local.shallow(TEXT)
    async with channel_to(cloud) as stub:
        first, told = await opened(stub, cloud)
        assert re.fullmatch("[0-9a-f]{32}", told.session_id)
        assert told.resume_ms == 60_000
        await first.step(0, shallow[:60], pb.WANT_NONE, epoch=7)
        await first.result()
        first.call.cancel()
        await until(cloud, "hat_num_sessions_lost", 1)
        assert sample(cloud, "hat_num_sessions_open") == 0
        second, again = await resumed(stub, cloud, told.session_id)
        assert (again.session_id, again.committed) == (told.session_id, 60)
        await second.step(60, shallow[60:], pb.WANT_ALL)
        close_to(await second.result(), local.deep(shallow)[60:])
        assert sample(cloud, "hat_num_sessions_lost") == 0
        assert await close(second) is grpc.StatusCode.OK
        await until(cloud, "hat_kv_cache_usage_ratio", 0)


async def test_only_the_new_stream_may_write(cloud: RunningCloud, local: LocalSplit) -> None:
    """The old one lives on, and sends Steps of a higher epoch: they change nothing, and it ends with ABORTED."""
    shallow = local.shallow(TEXT)
    async with channel_to(cloud) as stub:
        old, told = await opened(stub, cloud)
        await old.step(0, shallow[:30], pb.WANT_NONE)
        await old.result()
        new, again = await resumed(stub, cloud, told.session_id)
        assert again.committed == 30
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended meanwhile
            for _ in range(20):
                await old.step(0, shallow[:4], pb.WANT_ALL, epoch=99)
        code, text = await old.end()
        assert code is ABORTED
        assert "another stream has resumed this session" in text
        await new.step(30, shallow[30:], pb.WANT_ALL)
        close_to(await new.result(), local.deep(shallow)[30:])
        # A replayed resume of the same peer takes it over once more: still only one may write.
        newest, _ = await resumed(stub, cloud, told.session_id)
        assert (await new.end())[0] is ABORTED
        await newest.step(90, shallow[:1], pb.WANT_NONE)
        assert (await newest.result()).status == pb.STATUS_OK
        await close(newest)
        await until(cloud, "hat_kv_cache_usage_ratio", 0)


async def test_whose_session_it_is_nobody_else_learns(cloud: RunningCloud, local: LocalSplit) -> None:
    """Unknown, closed, of another tenant or device, live or lost, and not to be resumed: one answer for all."""
    shallow = local.shallow(TEXT)
    mine = {"tenant": "a", "device": "jetson-1"}
    async with channel_to(cloud) as stub:
        closed, of_closed = await opened(stub, cloud, **mine)
        await close(closed)
        lost, of_lost = await opened(stub, cloud, **mine)
        await lost.step(0, shallow[:8], pb.WANT_NONE)
        await lost.result()
        lost.call.cancel()
        await until(cloud, "hat_num_sessions_lost", 1)
        live, of_live = await opened(stub, cloud, **mine)
        fixed, of_fixed = await opened(stub, cloud, resumable=False, **mine)
        assert of_fixed.resume_ms == 0
        tries = [("ab" * 16, mine), (of_closed.session_id, mine), (of_fixed.session_id, mine)]
        for other in ({"tenant": "b", "device": "jetson-1"}, {"tenant": "a", "device": "jetson-2"}, {}):
            tries += [(of_lost.session_id, other), (of_live.session_id, other)]
        texts = set()
        for session_id, peer in tries:
            code, text = await refused(stub, cloud, session_id, **peer)
            assert code is NOT_FOUND
            texts.add(text.replace(session_id, "ID"))
        assert texts == {"session 'ID' is unknown, or is kept no longer"}
        for session in (live, fixed):  # nobody has noticed
            await session.step(0, shallow[:8], pb.WANT_NONE)
            assert (await session.result()).status == pb.STATUS_OK
        again, told = await resumed(stub, cloud, of_lost.session_id, **mine)
        assert told.committed == 8
        fixed.call.cancel()
        await asyncio.gather(close(again), close(live))
        await until(cloud, "hat_kv_cache_usage_ratio", 0)


async def test_session_ids_are_not_guessable(cloud: RunningCloud) -> None:
    async with channel_to(cloud) as stub:
        ids = []
        for _ in range(64):
            session, told = await opened(stub, cloud)
            ids.append(told.session_id)
            await close(session)
    bits = [f"{int(one, 16):0128b}" for one in ids]
    assert len(set(ids)) == 64
    apart = [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in itertools.pairwise(bits)]
    assert all(24 < differing < 104 for differing in apart)  # 64 +- 7 standard deviations


@pytest.mark.parametrize("ttl_s", [0.0, 0.3])
async def test_a_lost_session_is_freed_in_time(tiny_llama: Path, local: LocalSplit, ttl_s: float) -> None:
    async with running_cloud(config(tiny_llama, resume_ttl_s=ttl_s)) as cloud, channel_to(cloud) as stub:
        session, told = await opened(stub, cloud)
        assert told.resume_ms == ttl_s * 1000
        await session.step(0, local.shallow(TEXT), pb.WANT_NONE)
        await session.result()
        session.call.cancel()
        await until(cloud, "hat_kv_cache_usage_ratio", 0)
        assert sample(cloud, "hat_num_sessions_lost") == 0
        assert (await refused(stub, cloud, told.session_id))[0] is NOT_FOUND
        await cloud.engine.idle()


async def test_lost_sessions_keep_a_share_and_give_way_first(tiny_llama: Path, local: LocalSplit) -> None:
    """Half of 96 pages holds two sessions of 23; the first that was lost has lost its pages, but can be resumed. Who
    needs pages takes those of a lost session before those of an idle one."""
    shallow = local.shallow(TEXT)
    scheduler = SchedulerConfig(idle_after_s=0.0)
    fields: dict[str, Any] = {"engine": EngineConfig(scheduler=scheduler, lost_share=0.5)}
    async with running_cloud(config(tiny_llama, **fields)) as cloud, channel_to(cloud) as stub:

        async def filled() -> tuple[RawSession, str]:
            session, told = await opened(stub, cloud)
            await session.step(0, shallow, pb.WANT_NONE)
            await session.result()
            return session, told.session_id

        ids = []
        for number in range(3):
            session, session_id = await filled()
            ids.append(session_id)
            session.call.cancel()
            await until(cloud, "hat_num_sessions_lost", number + 1)
        assert cloud.engine.runner.cache.free_pages == 96 - 2 * 23
        idle, _ = await filled()
        busy, _ = await filled()  # 4 pages are left
        another, _ = await filled()
        await idle.step(89, shallow[89:], pb.WANT_LAST)  # was not taken from
        assert (await idle.result()).status == pb.STATUS_OK
        assert not idle.notices
        held = []
        for session_id in ids:
            session, told = await resumed(stub, cloud, session_id)
            held.append(told.committed)
            await session.step(told.committed, shallow[told.committed :][:1], pb.WANT_LAST)
            close_to(
                await session.result(), local.deep(shallow)[told.committed :][:1]
            ) if told.committed < 90 else None
            await close(session)
        assert held == [0, 0, 90]
        await asyncio.gather(*map(close, (idle, busy, another)))
        await until(cloud, "hat_kv_cache_usage_ratio", 0)
        await cloud.engine.idle()


async def test_a_draining_cloud_tells_and_takes_nobody_back(tiny_llama: Path, local: LocalSplit) -> None:
    """Not ready at once, new sessions and resumes refused with UNAVAILABLE; the running one goes on to its end."""
    import urllib.error
    import urllib.request

    shallow = local.shallow(TEXT)
    serving = running_cloud(config(tiny_llama, drain_s=10.0))
    cloud = await serving.__aenter__()
    async with channel_to(cloud) as stub, channel_to(cloud) as other:
        running, _ = await opened(stub, cloud)
        lost, of_lost = await opened(other, cloud)
        lost.call.cancel()
        await until(cloud, "hat_num_sessions_lost", 1)
        ending = asyncio.create_task(serving.__aexit__(None, None, None))
        assert (await running.call.read()).notice.drain.deadline_ms == 10_000

        def ready() -> int:
            try:
                return int(urllib.request.urlopen(cloud.admin_url + "/readyz").status)
            except urllib.error.HTTPError as error:
                return error.code

        assert await asyncio.to_thread(ready) == 503
        assert (await refused(other, cloud, of_lost.session_id))[0] is grpc.StatusCode.UNAVAILABLE
        await running.step(0, shallow, pb.WANT_ALL)
        close_to(await running.result(), local.deep(shallow))
        assert not ending.done()
        await close(running)
        await ending  # nobody is left to wait for


def poison(cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Passes that hold a segment of so many rows raise."""
    run = cloud.engine.runner.run

    def raising(segments: Any) -> Any:
        if any(len(segment.hidden) == rows for segment in segments):
            raise RuntimeError("poisoned")
        return run(segments)

    monkeypatch.setattr(cloud.engine.runner, "run", raising)


async def test_a_step_that_poisons_a_pass_ends_its_own_session_only(
    cloud: RunningCloud, local: LocalSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sessions in one pass; the one whose rows raise gets INTERNAL, the others their exact deep states."""
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    poison(cloud, monkeypatch, 13)
    held = asyncio.Event()
    async with channel_to(cloud) as stub:
        good = [(await opened(stub, cloud))[0] for _ in range(3)]
        bad, _ = await opened(stub, cloud)
        cloud.engine._inbox.put(lambda: asyncio.run(_wait(held)))  # so that all are in one pass
        await bad.step(0, shallow[:13], pb.WANT_ALL)
        for session in good:
            await session.step(0, shallow[:40], pb.WANT_ALL)
        await asyncio.sleep(0.1)
        held.set()
        code, text = await bad.end()
        assert code is grpc.StatusCode.INTERNAL
        assert "RuntimeError" in text
        for session in good:
            close_to(await session.result(), deep[:40])
            await session.step(40, shallow[40:50], pb.WANT_ALL)
            close_to(await session.result(), deep[40:50])
            await close(session)
        await until(cloud, "hat_kv_cache_usage_ratio", 0)


async def _wait(event: asyncio.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_an_engine_that_serves_nobody_is_told_to_everybody(
    tiny_llama: Path, local: LocalSplit, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Every stream gets UNAVAILABLE, new ones too; the cloud is not ready, and says why it should end."""
    import threading
    import urllib.error
    import urllib.request

    shallow, stuck = local.shallow(TEXT), threading.Event()
    async with running_cloud(config(tiny_llama, watchdog_s=1.0)) as cloud, channel_to(cloud) as stub:
        sessions = [(await opened(stub, cloud))[0] for _ in range(3)]

        def run(segments: Any) -> Any:
            if how == "hangs":
                stuck.wait()
            raise SystemExit("not an error of one session")

        monkeypatch.setattr(cloud.engine.runner, "run", run)
        await sessions[0].step(0, shallow[:4])
        reason = await asyncio.wait_for(asyncio.shield(cloud.broken), 30)
        assert ("stuck" if how == "hangs" else "failed") in reason
        for session in sessions:
            code, text = await session.end()
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "engine" in text
        assert (await refused(stub, cloud, "ab" * 16))[0] is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(urllib.error.HTTPError, match="503") as not_ready:
            await asyncio.to_thread(urllib.request.urlopen, cloud.admin_url + "/readyz")
        assert reason in not_ready.value.read().decode()
        stuck.set()


@asynccontextmanager
async def narrow_channel(cloud: RunningCloud) -> AsyncIterator[rpc.RuntimeStub]:
    """To a device whose gRPC takes no more than 64 KiB of what is not read; otherwise that grows with the link."""
    options = (("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", 1 << 20))
    async with grpc.aio.insecure_channel(cloud.address, options=options) as channel:
        yield rpc.RuntimeStub(channel)  # type: ignore[no-untyped-call]


async def test_a_device_that_does_not_read_is_not_read_from(cloud: RunningCloud, local: LocalSplit) -> None:
    """Results that nobody reads are bounded by the Steps that may be unanswered; nothing is lost once it reads."""
    shallow, steps = local.shallow(TEXT), 300
    row = shallow[:64]
    async with narrow_channel(cloud) as stub:
        session, told = await opened(stub, cloud)

        async def send() -> None:
            for _ in range(steps):
                await session.step(0, row, pb.WANT_ALL)

        sending = asyncio.create_task(send())
        seen = -1.0
        while seen != (now := sample(cloud, "hat_verify_passes_total")) or now < 1:
            seen = now
            await asyncio.sleep(0.5)
        # Beside the bound, what gRPC and the kernel hold: 64 KiB and more of 16 KiB each. The Steps that wait
        # behind are gRPC's as well, as many as its window lets in.
        assert told.limits.max_inflight_steps <= seen < steps / 2
        for _ in range(steps):
            assert (await session.result()).status == pb.STATUS_OK
        await sending
        await close(session)


async def test_a_device_that_does_not_read_the_end_of_its_stream_is_left(
    cloud: RunningCloud, local: LocalSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "PARTING_S", 0.2)
    row = local.shallow(TEXT)[:64]
    ended = cloud.metrics.ended
    async with narrow_channel(cloud) as stub:
        session, _ = await opened(stub, cloud)
        for _ in range(24):  # as many as gRPC takes of what is not read
            await session.step(0, row, pb.WANT_ALL)
        await until(cloud, "hat_verify_passes_total", 24)
        await session.step(500, row, pb.WANT_ALL)  # jumps forward
        async with asyncio.timeout(20):
            while not sum(s.value for m in ended.collect() for s in m.samples if s.name.endswith("_total")):
                await asyncio.sleep(0.01)
        await until(cloud, "hat_kv_cache_usage_ratio", 0)
