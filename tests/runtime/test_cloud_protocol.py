"""The session protocol against a real server: what is right is exact, what is wrong ends its own stream only."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from hat_runtime.cloud import server as cloud_server
from hat_runtime.cloud.engine import EngineConfig
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.model.manifest import identity
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from hat_runtime.wire import frames
from tests.runtime.raw_client import (
    LocalSplit,
    RawSession,
    all_pages_back,
    channel_to,
    open_session,
    opening,
    states,
)

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
TEXT = torch.randint(3, 199, (90,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> LocalSplit:
    return LocalSplit(tiny_llama)


def config(folder: Path, **fields: Any) -> CloudConfig:
    small = {"input_layers": 2, "dtype": "float32", "kv_pages": 96, "page_tokens": 4, "drain_s": 0.2}
    return CloudConfig(model=folder, **(small | fields))


@pytest.fixture
async def cloud(tiny_llama: Path) -> AsyncIterator[RunningCloud]:
    async with running_cloud(config(tiny_llama)) as running:
        yield running
        await all_pages_back(running)


async def test_wants_chunks_and_rollbacks_give_the_exact_deep_states(
    cloud: RunningCloud, local: LocalSplit
) -> None:
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    async with channel_to(cloud) as stub:
        session = await open_session(stub, cloud)
        await session.step(0, shallow[:50], pb.WANT_NONE)
        await session.step(50, shallow[50:60], pb.WANT_LAST)
        await session.step(60, shallow[60:70], pb.WANT_ALL)
        none, last, every = [await session.result() for _ in range(3)]
        assert (none.payload, none.start_pos, none.n) == (b"", 0, 50)
        torch.testing.assert_close(states(last), deep[59:60], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states(every), deep[60:70], atol=1e-4, rtol=1e-4)
        assert every.compute_us > 0
        assert every.batch_tokens >= 10

        other = local.shallow(torch.cat([TEXT[:33], TEXT[:20]]))  # another continuation from position 33
        await session.step(33, other[33:53], pb.WANT_ALL, epoch=1)
        torch.testing.assert_close(
            states(await session.result()), local.deep(other)[33:53], atol=1e-4, rtol=1e-4
        )
        await session.call.done_writing()
        assert (await session.end())[0] is grpc.StatusCode.OK


async def test_alternatives_bring_deep_states_and_leave_nothing_behind(
    cloud: RunningCloud, local: LocalSplit
) -> None:
    """Two Steps with alternatives, queued together, and one more: what each would say in its place."""
    shallow, aside = local.shallow(TEXT), [31, 33, 33]
    others = [torch.cat([TEXT[:at], TEXT[at : at + 1] - 1 - n]) for n, at in enumerate([*aside, 41])]
    ends = [local.shallow(other) for other in others]
    rows = torch.cat([end[-1:] for end in ends])
    async with channel_to(cloud) as stub:
        session = await open_session(stub, cloud)
        await session.step(0, shallow[:30], pb.WANT_NONE)
        await session.step(30, torch.cat([shallow[30:34], rows[:3]]), n=4, alternatives=aside)
        await session.step(34, torch.cat([shallow[34:41], rows[3:]]), n=7, alternatives=[41])
        await session.step(41, shallow[41:])
        _, first, second, third = [await session.result() for _ in range(4)]
        assert (first.n, second.n, third.n) == (4, 7, len(TEXT) - 41)
        said = torch.cat([states(result) for result in (first, second, third)])
        deep = local.deep(shallow)
        alternatives = [local.deep(end)[-1:] for end in ends]
        expected = torch.cat([deep[30:34], *alternatives[:3], deep[34:41], alternatives[3], deep[41:]])
        torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)


async def test_alternatives_need_room_in_the_session(cloud: RunningCloud, local: LocalSplit) -> None:
    """Two Steps whose alternatives do not fit together run in two passes; one that never fits is refused."""
    shallow = local.shallow(TEXT)
    async with channel_to(cloud) as stub:
        session = await open_session(stub, cloud, max_tokens=40)
        await session.step(0, shallow[:32], pb.WANT_NONE)
        await session.step(32, shallow[32:38], n=4, alternatives=[33, 33])
        await session.step(36, shallow[36:40], n=2, alternatives=[37, 37])
        none, *results = [await session.result() for _ in range(3)]
        assert none.n == 32
        assert [len(states(result)) for result in results] == [6, 4]
        await session.step(38, shallow[38:41], n=2, alternatives=[39])
        code, details = await session.end()
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert "start_pos=38 + n=2 + 1 alternatives is beyond the session's 40 tokens" in details


async def test_a_step_of_many_frames_is_one_step(tiny_llama: Path, local: LocalSplit) -> None:
    shallow = local.shallow(TEXT)
    async with running_cloud(config(tiny_llama)) as cloud, channel_to(cloud) as stub:
        session = await open_session(stub, cloud)
        whole = shallow.contiguous().view(torch.uint8).numpy().tobytes()
        cuts = [0, 1000, 1001, len(whole)]
        for first, last in itertools.pairwise(cuts):
            more = last < len(whole)
            await session.step(0, shallow, payload=whole[first:last], more=more)
        torch.testing.assert_close(states(await session.result()), local.deep(shallow), atol=1e-4, rtol=1e-4)


async def test_steps_of_an_older_epoch_are_stale_and_the_stream_lives_on(
    cloud: RunningCloud, local: LocalSplit
) -> None:
    """The old Steps are still queued when the new epoch arrives: they cost no compute, whatever their start_pos."""
    shallow = local.shallow(TEXT)
    blocker = asyncio.Event()
    cloud.engine._inbox.put(
        lambda: asyncio.run(_wait(blocker))
    )  # holds the engine's thread, so that Steps queue up
    async with channel_to(cloud) as stub:
        session = await open_session(stub, cloud)
        await session.step(0, shallow[:10], pb.WANT_LAST)
        await session.step(10, shallow[10:12], pb.WANT_ALL)
        await session.step(12, shallow[12:14], pb.WANT_ALL)
        await session.step(0, shallow[:20], pb.WANT_LAST, epoch=1)
        await asyncio.sleep(0.1)
        blocker.set()
        results = [await session.result() for _ in range(4)]
    assert [r.status for r in results] == [pb.STATUS_STALE] * 3 + [pb.STATUS_OK]
    assert [r.payload for r in results[:3]] == [b""] * 3
    torch.testing.assert_close(states(results[3]), local.deep(shallow)[19:20], atol=1e-4, rtol=1e-4)


async def _wait(event: asyncio.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.005)


def _step(**fields: Any) -> pb.DeviceMessage:
    right = {"epoch": 0, "start_pos": 8, "n": 2, "want": pb.WANT_ALL, "payload": bytes(2 * 64 * 4)}
    return pb.DeviceMessage(step=pb.Step(**(right | fields)))


NAN = torch.full((2, 64), float("nan")).numpy().tobytes()
INFINITE = torch.full((2, 64), float("inf")).numpy().tobytes()
WRONG = {
    "nan": (_step(payload=NAN), INVALID, "not finite"),
    "infinity": (_step(payload=INFINITE), INVALID, "not finite"),
    "wrong width": (_step(payload=bytes(2 * 63 * 4)), INVALID, "504 bytes"),
    "wrong dtype": (_step(payload=bytes(2 * 64 * 2)), INVALID, "64 x float32 are 512 bytes"),
    "too many bytes": (_step(payload=bytes(2 * 64 * 4 + 4)), INVALID, "516 bytes"),
    "forward jump": (_step(start_pos=9), INVALID, "start_pos=9 jumps forward: 8 tokens are committed"),
    "alternative before the Step": (
        _step(n=1, alternatives=[7]), INVALID, "Step.alternatives holds 7, which is not 8 to 9"
    ),
    "alternative behind the Step": (_step(n=1, alternatives=[10]), INVALID, "holds 10, which is not 8 to 9"),
    "alternatives of a chunk": (
        _step(n=1, alternatives=[9], want=pb.WANT_LAST), INVALID, "Step.want must be ALL"
    ),
    "alternatives without rows": (_step(alternatives=[9]), INVALID, "512 bytes, but n=3 rows of 64 x float32"),
    "too many alternatives": (_step(n=1, alternatives=[9] * 9), INVALID, "9 positions; at most 8 for each of n=1"),
    "too many rows": (_step(n=300, alternatives=[9] * 2000), INVALID, "and 2000 alternatives are more"),
    "no tokens": (_step(n=0, payload=b""), INVALID, "Step.n=0"),
    "too many tokens": (_step(n=5000), INVALID, "Step.n=5000"),
    "beyond the session": (
        _step(start_pos=8, n=400, payload=bytes(400 * 256)), grpc.StatusCode.OUT_OF_RANGE, "beyond the session's 384",
    ),
    "no want": (_step(want=0), INVALID, "Step.want=0"),
    "oversize frame": (_step(n=2048, payload=bytes(600_000)), INVALID, "a frame holds at most 524288"),
    "oversize message": (_step(n=2048, payload=bytes(1_100_000)), grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    "second open": (pb.DeviceMessage(open=pb.Open()), PRECONDITION, "second Open"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_step_ends_its_own_stream_only(
    case: str, cloud: RunningCloud, local: LocalSplit
) -> None:
    """Two good sessions share the engine with the bad one, before, during and after."""
    message, code, text = WRONG[case]
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    async with channel_to(cloud) as stub:
        good = [await open_session(stub, cloud) for _ in range(2)]
        bad = await open_session(stub, cloud)
        for session in (*good, bad):
            await session.step(0, shallow[:8], pb.WANT_NONE)
        for session in (*good, bad):
            await session.result()
        await asyncio.gather(
            bad.send(message), *(session.step(8, shallow[8:40], pb.WANT_ALL) for session in good)
        )
        ended, details = await bad.end()
        assert ended is code, details
        assert text in details
        for session in good:
            torch.testing.assert_close(states(await session.result()), deep[8:40], atol=1e-3, rtol=0)
            await session.step(40, shallow[40:41], pb.WANT_LAST)
            torch.testing.assert_close(states(await session.result()), deep[40:41], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "code", "text"),
    [
        pytest.param({"start_pos": 8, "payload": NAN}, INVALID, "not finite", id="nan"),
        pytest.param(
            {"start_pos": 8, "n": 377, "payload": bytes(377 * 256)},
            grpc.StatusCode.OUT_OF_RANGE,
            "beyond the session's 384",
            id="beyond the session",
        ),
    ],
)
async def test_a_wrong_step_right_behind_a_good_one_is_found_too(
    cloud: RunningCloud, local: LocalSplit, wrong: dict[str, Any], code: grpc.StatusCode, text: str
) -> None:
    """Adjacent Steps of a session run in one pass; a wrong one must not slip in with the one before it."""
    shallow = local.shallow(TEXT)
    blocker = asyncio.Event()
    cloud.engine._inbox.put(lambda: asyncio.run(_wait(blocker)))
    async with channel_to(cloud) as stub:
        session = await open_session(stub, cloud)
        await session.step(0, shallow[:8], pb.WANT_LAST)
        await session.send(_step(want=pb.WANT_NONE, **wrong))
        await asyncio.sleep(0.1)
        blocker.set()
        torch.testing.assert_close(
            states(await session.result()), local.deep(shallow)[7:8], atol=1e-4, rtol=1e-4
        )
        ended, details = await session.end()
        assert ended is code
        assert text in details


MISMATCHES = {
    "revision": ({"model_revision": "0" * 64}, PRECONDITION, "model_revision"),
    "layers": ({"lo": 3}, PRECONDITION, "layers '3:6' of the device is not the cloud's '2:6'"),
    "dtype": ({"dtype": "bfloat16"}, PRECONDITION, "dtype 'bfloat16'"),
    "codec": ({"codec": "zip"}, PRECONDITION, "codec 'zip' is none of raw, bf16, int8, int4"),
    "decode codec": ({"decode_codec": "zip"}, PRECONDITION, "decode_codec 'zip' is none of raw"),
    "no codec": ({"codec": ""}, PRECONDITION, "codec '' is none of raw"),
    "max_tokens": ({"max_tokens": 4096}, INVALID, "Open.max_tokens=4096"),
    "unknown session": ({"resume": pb.Resume(session_id="ab" * 16)}, grpc.StatusCode.NOT_FOUND, "abab"),
}


@pytest.mark.parametrize("case", MISMATCHES)
async def test_a_mismatch_is_refused_before_any_compute(case: str, cloud: RunningCloud) -> None:
    fields, code, text = MISMATCHES[case]
    async with channel_to(cloud) as stub:
        session = RawSession(stub.Session())
        await session.send(opening(cloud, **fields))
        ended, details = await session.end()
        assert ended is code
        assert text in details


async def test_other_weights_under_the_same_config_are_another_revision(
    cloud: RunningCloud, other_llama: Path
) -> None:
    other = identity(other_llama)
    async with channel_to(cloud) as stub:
        session = RawSession(stub.Session())
        await session.send(opening(cloud, model_revision=other.model_revision))
        assert (await session.end())[0] is PRECONDITION


async def test_garbage_and_a_missing_open_get_a_status(cloud: RunningCloud) -> None:
    async with grpc.aio.insecure_channel(cloud.address) as channel:
        raw = channel.stream_stream("/hat.v1.Runtime/Session")
        garbage = RawSession(raw())
        await garbage.call.write(b"\xff\xff\xff not a message")
        assert (await garbage.end())[0] is PRECONDITION
        after_open = RawSession(raw())
        await after_open.call.write(opening(cloud).SerializeToString())
        await after_open.call.read()
        await after_open.call.write(b"\xff\xff\xff not a message")
        assert (await after_open.end())[0] is INVALID
        first_step = RawSession(raw())
        await first_step.call.write(_step().SerializeToString())
        assert (await first_step.end())[0] is PRECONDITION
        describe = channel.unary_unary("/hat.v1.Runtime/Describe")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await describe(b"\xff\xff\xff")
        assert error.value.code() is INVALID


async def test_width_8192_and_512_tokens_travel_in_frames(tmp_path: Path) -> None:
    """16 MiB a chunk in float32, 32 frames each way."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    wide = LlamaConfig(
        vocab_size=8, hidden_size=8192, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path)
    hidden = torch.randn(512, 8192)
    async with (
        running_cloud(config(tmp_path, input_layers=1, kv_pages=200)) as cloud,
        channel_to(cloud) as stub,
    ):
        session = await open_session(stub, cloud)
        payload = hidden.numpy().tobytes()
        step = cloud.limits.max_frame_bytes
        writer = asyncio.create_task(_write_frames(session, hidden, payload, step))
        result = await session.result()
        await writer
        assert len(result.payload) == len(payload)
        local = LocalSplit(tmp_path, input_layers=1, layers=2)
        torch.testing.assert_close(states(result, 8192), local.deep(hidden), atol=1e-3, rtol=1e-3)


async def _write_frames(session: RawSession, hidden: torch.Tensor, payload: bytes, step: int) -> None:
    for first in range(0, len(payload), step):
        part = payload[first : first + step]
        await session.step(0, hidden, payload=part, more=first + step < len(payload))


async def test_when_pages_run_out_the_idle_session_is_evicted_and_can_come_back(
    tiny_llama: Path, local: LocalSplit
) -> None:
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    engine = EngineConfig(scheduler=SchedulerConfig(idle_after_s=0.0))
    async with (
        running_cloud(config(tiny_llama, kv_pages=25, engine=engine)) as cloud,
        channel_to(cloud) as stub,
    ):
        first, second = await open_session(stub, cloud), await open_session(stub, cloud)
        await first.step(0, shallow[:80], pb.WANT_LAST)
        await first.result()
        await second.step(0, shallow, pb.WANT_ALL)
        torch.testing.assert_close(states(await second.result()), deep, atol=1e-4, rtol=1e-4)
        await first.step(80, shallow[80:82], pb.WANT_ALL)  # under way when the eviction happened
        assert (await first.result()).status == pb.STATUS_STALE
        assert [notice.evicted.committed for notice in first.notices] == [0]
        await first.step(0, shallow, pb.WANT_ALL, epoch=1)
        torch.testing.assert_close(states(await first.result()), deep, atol=1e-4, rtol=1e-4)


async def test_more_sessions_than_pages_all_finish(tiny_llama: Path, local: LocalSplit) -> None:
    """Six sessions of 90 tokens share pages for two: each is evicted, comes back, and ends exact."""
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    async with running_cloud(config(tiny_llama, kv_pages=46)) as cloud, channel_to(cloud) as stub:

        async def upload() -> torch.Tensor:
            session, epoch = await open_session(stub, cloud), 0
            position, out = 0, torch.zeros(90, 64)
            while position < 90:
                end = min(90, position + 9)
                await session.step(position, shallow[position:end], pb.WANT_ALL, epoch=epoch)
                result = await session.result()
                if result.status == pb.STATUS_STALE:
                    position, epoch = 0, epoch + 1
                    continue
                out[position:end] = states(result)
                position = end
            await session.call.done_writing()
            await session.end()
            return out

        for out in await asyncio.gather(*(upload() for _ in range(6))):
            torch.testing.assert_close(out, deep, atol=1e-4, rtol=1e-4)
        await all_pages_back(cloud)


async def test_too_many_sessions_are_refused_with_a_retry_time(tiny_llama: Path) -> None:
    async with running_cloud(config(tiny_llama, max_sessions=2)) as cloud, channel_to(cloud) as stub:
        kept = [await open_session(stub, cloud) for _ in range(2)]
        refused = RawSession(stub.Session())
        await refused.send(opening(cloud))
        code, text = await refused.end()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 sessions are busy" in text
        metadata = dict(await refused.call.trailing_metadata())
        assert int(metadata["grpc-retry-pushback-ms"]) > 0
        for session in kept:
            session.call.cancel()


async def test_an_idle_session_is_reaped(tiny_llama: Path, local: LocalSplit) -> None:
    async with (
        running_cloud(config(tiny_llama, engine=EngineConfig(idle_ttl_s=0.2))) as cloud,
        channel_to(cloud) as stub,
    ):
        session = await open_session(stub, cloud)
        await session.step(0, local.shallow(TEXT))
        code, text = await session.end()
        assert code is grpc.StatusCode.ABORTED
        assert "idle for 0.2 s" in text
        await all_pages_back(cloud)


async def test_a_failing_pass_ends_its_sessions_and_the_engine_serves_on(
    cloud: RunningCloud, local: LocalSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = local.shallow(TEXT)
    async with channel_to(cloud) as stub:
        with monkeypatch.context() as patch:
            patch.setattr(cloud.engine.runner.layers, "forward", lambda *_: 1 / 0)
            session = await open_session(stub, cloud)
            await session.step(0, shallow)
            assert (await session.end())[0] is grpc.StatusCode.INTERNAL
        session = await open_session(stub, cloud)
        await session.step(0, shallow)
        torch.testing.assert_close(states(await session.result()), local.deep(shallow), atol=1e-4, rtol=1e-4)


async def test_drain_tells_the_devices(tiny_llama: Path) -> None:
    async with channel_holder() as holder:
        async with running_cloud(config(tiny_llama, drain_s=0.5)) as cloud:
            stub = await holder(cloud)
            session = await open_session(stub, cloud)
        assert (await session.call.read()).notice.drain.deadline_ms == 500


class channel_holder:
    """Keeps a channel open longer than its cloud."""

    async def __aenter__(self) -> Any:
        self.contexts: list[Any] = []
        return self.open

    async def open(self, cloud: RunningCloud) -> Any:
        context = channel_to(cloud)
        self.contexts.append(context)
        return await context.__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        for context in self.contexts:
            await context.__aexit__(None, None, None)


async def test_describe_health_reflection_and_metrics(cloud: RunningCloud) -> None:
    import urllib.request

    async with grpc.aio.insecure_channel(cloud.address) as channel, channel_to(cloud) as stub:
        described = await stub.Describe(pb.DescribeRequest(padding=bytes(1000), reply_padding_bytes=2000))
        assert (described.model.lo, described.model.hi, described.model.dtype) == (2, 6, "float32")
        assert len(described.padding) == 2000
        assert described.pages.total == described.pages.free == 96
        status = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="hat.v1.Runtime")
        )
        assert status.status == health_pb2.HealthCheckResponse.SERVING

    def look() -> tuple[list[str], str, str]:
        with grpc.insecure_channel(cloud.address) as blocking:
            names = list(ProtoReflectionDescriptorDatabase(blocking).get_services())
        ready = urllib.request.urlopen(cloud.admin_url + "/readyz").read().decode()
        return names, ready, urllib.request.urlopen(cloud.admin_url + "/metrics").read().decode()

    names, ready, metrics = await asyncio.to_thread(look)
    assert "hat.v1.Runtime" in names
    assert ready == "ready\n"
    assert "hat_kv_cache_usage_ratio 0.0" in metrics
    assert 'layers="2:6"' in metrics


async def test_a_stream_that_says_nothing_ends(cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its Open it counts for no limit."""
    monkeypatch.setattr(cloud_server, "OPEN_S", 0.1)
    async with channel_to(cloud) as stub:
        silent = RawSession(stub.Session())
        await silent.call.wait_for_connection()
        code, text = await silent.end()
        assert (code, text) == (grpc.StatusCode.DEADLINE_EXCEEDED, "no Open came in 0.1 s")


async def test_padded_replies_that_nobody_reads_are_few(cloud: RunningCloud) -> None:
    padded = pb.DescribeRequest(reply_padding_bytes=frames.MAX_FRAME_BYTES)
    async with deaf_channel(cloud) as (stub, hears), channel_to(cloud) as other:
        await stub.Describe(padded)
        hears.clear()
        calls = [asyncio.ensure_future(stub.Describe(padded)) for _ in range(40)]
        with pytest.raises(grpc.aio.AioRpcError, match="replies with padding are on their way") as refusal:
            await describe_for_ever(other, padded)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await other.Describe(pb.DescribeRequest())  # without padding it is answered
        hears.set()
        replies = await asyncio.gather(*calls, return_exceptions=True)
        answered = sum(isinstance(reply, pb.DescribeReply) for reply in replies)
        assert 1 <= answered <= 2 * cloud_server.MOST_PADDED
        await other.Describe(padded)


async def describe_for_ever(stub: rpc.RuntimeStub, request: pb.DescribeRequest) -> None:
    while True:
        await stub.Describe(request)


@asynccontextmanager
async def deaf_channel(cloud: RunningCloud) -> AsyncIterator[tuple[rpc.RuntimeStub, asyncio.Event]]:
    """A channel that hears what comes from the cloud only while the event is set."""
    hears = asyncio.Event()
    hears.set()
    host, _, port = cloud.address.rpartition(":")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, down: bool) -> None:
        with suppress(ConnectionError):
            while data := await source.read(1 << 16):
                if down:
                    await hears.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_cloud, to_cloud = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, to_cloud, False), pump(from_cloud, writer, True))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        own_port = server.sockets[0].getsockname()[1]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{own_port}") as channel:
            yield rpc.RuntimeStub(channel), hears
