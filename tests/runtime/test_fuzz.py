"""Random and mutated messages against a live server: the others' sessions stay exact and nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import torch

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.fuzz.frames import Nonsense, TokenNonsense
from tests.fuzz.watch import Watch
from tests.runtime.picospec_pair import Whole
from tests.runtime.raw_client import LocalSplit, RawSession, all_pages_back, channel_to, open_session, states
from tests.runtime.test_picospec_protocol import PROMPT, first, step

TEXT = torch.randint(3, 199, (60,), generator=torch.Generator().manual_seed(8))
STATUSES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
}
"""What a stream of nonsense may end with: never UNKNOWN or INTERNAL, which would be an exception in the server."""
PAGES = 200

Check = Callable[[], Awaitable[None]]


async def throw(channel: grpc.aio.Channel, messages: list[bytes]) -> grpc.StatusCode:
    """Send a stream of raw bytes and read it to its end; OK if the client's own library hid the status."""
    session = RawSession(channel.stream_stream("/hat.v1.Runtime/Session")())
    try:
        for message in messages:
            await session.call.write(message)
        await session.call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # refused before everything was sent
    async with asyncio.timeout(60):
        code, details = await session.end()
    # grpc.aio makes up a status of its own when a write meets a stream that the server has ended.
    return grpc.StatusCode.OK if details == "Internal error from Core" else code


async def ask(channel: grpc.aio.Channel, request: bytes) -> grpc.StatusCode:
    """Describe with raw bytes."""
    try:
        await channel.unary_unary("/hat.v1.Runtime/Describe")(request)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def bombard(cloud: RunningCloud, nonsense: Nonsense, check: Check, watch: Watch) -> None:
    """Nonsense, eight streams at a time, and beside each such round a session that must stay right."""
    options = (("grpc.max_receive_message_length", 1 << 20),)
    async with grpc.aio.insecure_channel(cloud.address, options=options) as channel:
        while watch.under_way:
            streams = [nonsense.stream() for _ in range(8)]
            *seen, _ = await asyncio.gather(
                *(throw(channel, messages) for messages in streams),
                ask(channel, nonsense.describe()),
                check(),
            )
            watch.count(sum(map(len, streams)) + 1, *(code.name for code in seen))  # type: ignore[union-attr]
    assert set(watch.outcomes) <= {status.name for status in STATUSES}
    assert watch.outcomes["INVALID_ARGUMENT"]
    assert watch.outcomes["OK"]
    ended = {
        sample.labels["code"]
        for metric in cloud.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "hat_streams_ended_total"
    }
    assert ended <= {status.name for status in STATUSES} | {"CANCELLED"}
    watch.end()


def config(model: Path, **fields: object) -> CloudConfig:
    common = {"dtype": "float32", "kv_pages": PAGES, "page_tokens": 4, "drain_s": 0.1, "max_sessions": 16}
    return CloudConfig(model, **(common | fields))  # type: ignore[arg-type]


async def bombard_hat(model: Path, watch: Watch) -> None:
    local = LocalSplit(model)
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    async with running_cloud(config(model, input_layers=2)) as cloud, channel_to(cloud) as stub:
        canary = await open_session(stub, cloud)

        async def right() -> None:
            await canary.step(0, shallow[:50], pb.WANT_NONE, epoch=0)
            await canary.step(50, shallow[50:], pb.WANT_ALL, epoch=0)
            await canary.result()
            torch.testing.assert_close(states(await canary.result()), deep[50:], atol=1e-3, rtol=0)

        await bombard(cloud, Nonsense(watch.seed, cloud), right, watch)
        await canary.call.done_writing()
        await canary.end()
        await all_pages_back(cloud)


async def bombard_tokens(model: Path, watch: Watch) -> None:
    text = Whole(model).decode(PROMPT, 8)
    async with running_cloud(config(model, mode="picospec")) as cloud, channel_to(cloud) as stub:
        canary = await open_session(stub, cloud, mode="picospec", codec="tokens")

        async def right() -> None:
            await canary.send(first())
            await canary.send(step(len(PROMPT), text[:3], 3))
            assert (await canary.result()).verdict.next == text[0]
            verdict = (await canary.result()).verdict
            assert (verdict.accepted, verdict.refused, verdict.next) == (3, False, text[3])

        await bombard(cloud, TokenNonsense(watch.seed, cloud, 199), right, watch)
        await canary.call.done_writing()
        await canary.end()
        await all_pages_back(cloud)


async def test_fuzz_a_thousand_messages(tiny_llama: Path) -> None:
    await bombard_hat(tiny_llama, Watch("messages of mode hat", seed=1, total=1_000))


async def test_fuzz_a_thousand_messages_of_token_mode(tiny_llama: Path) -> None:
    await bombard_tokens(tiny_llama, Watch("messages of mode picospec", seed=1, total=1_000))


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_fuzz_many_messages(tiny_llama: Path) -> None:
    await bombard_hat(tiny_llama, Watch("messages of mode hat", seed=2, total=35_000))


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_fuzz_many_messages_of_token_mode(tiny_llama: Path) -> None:
    await bombard_tokens(tiny_llama, Watch("messages of mode picospec", seed=3, total=35_000))
