"""Random and mutated messages against a live server: the others' sessions stay exact and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import psutil
import pytest
import torch

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.raw_client import LocalSplit, RawSession, channel_to, open_session, opening, states

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


class Nonsense:
    """Messages that are nearly right, and bytes that are nearly messages."""

    def __init__(self, seed: int, cloud: RunningCloud) -> None:
        self.rng = random.Random(seed)
        self.cloud = cloud

    def stream(self) -> list[bytes]:
        """The messages of one stream; most begin with a correct Open, so that the rest is reached."""
        codec, decode_codec = (self.rng.choice(["raw", "raw", "int8", "int4"]) for _ in range(2))
        right = opening(self.cloud, codec=codec, decode_codec=decode_codec)
        first = right.SerializeToString() if self.rng.random() < 0.8 else self.message()
        return [first, *(self.message() for _ in range(self.rng.randint(1, 6)))]

    def message(self) -> bytes:
        rng = self.rng
        kind = rng.random()
        if kind < 0.1:
            return rng.randbytes(rng.choice([0, 1, 7, 200, 5000]))
        data = (self.step() if kind < 0.8 else self.other()).SerializeToString()
        return self.mutate(data) if rng.random() < 0.3 else data

    def step(self) -> pb.DeviceMessage:
        rng = self.rng
        n = rng.choice([0, 1, 1, 2, 5, 30, 3000, 2**32 - 1])
        encoded = rng.randbytes(min(n, 40) * rng.choice([82, 116]))  # of int4 and of int8
        payload = rng.choice([self.rows(n), self.rows(n), encoded, rng.randbytes(rng.randint(0, 600)), b""])
        return pb.DeviceMessage(
            step=pb.Step(
                epoch=rng.choice([0, 0, 1, 2**32 - 1]),
                start_pos=rng.choice([0, 0, 0, 1, 5, 400, 2**32 - 1]),
                n=n,
                want=rng.choice([0, 1, 2, 3, 3, 77]),
                payload=payload,
                more=rng.random() < 0.1,
                request_id=rng.choice(["", "x" * 5000, "\n\u202e"]),
                decode=rng.random() < 0.3,
            )
        )

    def rows(self, n: int) -> bytes:
        values = [0.5, -3.0, 1e30, -1e38, 1e-40] + [float("nan"), float("inf")] * (self.rng.random() < 0.2)
        count = min(n, 40) * 64
        return (
            torch.tensor([self.rng.choice(values) for _ in range(count)], dtype=torch.float32)
            .numpy()
            .tobytes()
        )

    def other(self) -> pb.DeviceMessage:
        rng = self.rng
        number = rng.choice([0.0, -1.0, 1e300, float("nan"), float("inf")])
        return rng.choice(
            [
                opening(self.cloud, max_tokens=rng.choice([0, 1, 2**32 - 1])),
                opening(
                    self.cloud, tenant="t" * rng.choice([0, 70_000]), request_id=rng.choice(["", "\x00"])
                ),
                opening(self.cloud, resume=pb.Resume(session_id=rng.choice(["", "ab"]))),
                pb.DeviceMessage(
                    telemetry=pb.Telemetry(rtt_s=number, uplink_bytes_per_s=number, ttft_s=number)
                ),
                pb.DeviceMessage(),
            ]
        )

    def mutate(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.rng.randint(1, 4)):
            if changed:
                at = self.rng.randrange(len(changed))
                changed[at : at + self.rng.randint(0, 2)] = self.rng.randbytes(self.rng.randint(0, 2))
        return bytes(changed)


async def throw(channel: grpc.aio.Channel, messages: list[bytes]) -> grpc.StatusCode:
    """Send a stream of raw bytes and read it to its end; OK if the client's own library hid the status."""
    session = RawSession(channel.stream_stream("/hat.v1.Runtime/Session")())
    try:
        for message in messages:
            await session.call.write(message)
        await session.call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # refused before everything was sent
    async with asyncio.timeout(30):
        code, details = await session.end()
    # grpc.aio makes up a status of its own when a write meets a stream that the server has ended.
    return grpc.StatusCode.OK if details == "Internal error from Core" else code


async def bombard(tiny_llama: Path, total: int, seed: int) -> None:
    local = LocalSplit(tiny_llama)
    shallow = local.shallow(TEXT)
    deep = local.deep(shallow)
    config = CloudConfig(
        tiny_llama, input_layers=2, dtype="float32", kv_pages=200, page_tokens=4, drain_s=0.1, max_sessions=16
    )
    async with running_cloud(config) as cloud, channel_to(cloud) as stub:
        nonsense = Nonsense(seed, cloud)
        canary = await open_session(stub, cloud)
        sent, seen = 0, set()
        process = psutil.Process()
        grown_from = 0
        async with grpc.aio.insecure_channel(cloud.address) as channel:
            while sent < total:
                streams = [nonsense.stream() for _ in range(8)]
                sent += sum(map(len, streams))
                await canary.step(0, shallow[:50], pb.WANT_NONE, epoch=0)
                await canary.step(50, shallow[50:], pb.WANT_ALL, epoch=0)
                seen |= set(await asyncio.gather(*(throw(channel, messages) for messages in streams)))
                await canary.result()
                torch.testing.assert_close(states(await canary.result()), deep[50:], atol=1e-3, rtol=0)
                if sent >= total // 2 and not grown_from:
                    grown_from = process.memory_info().rss
        assert seen <= STATUSES, seen - STATUSES
        assert grpc.StatusCode.INVALID_ARGUMENT in seen
        ended = {
            sample.labels["code"]
            for metric in cloud.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "hat_streams_ended_total"
        }
        assert ended <= {status.name for status in STATUSES} | {"CANCELLED"}
        assert process.memory_info().rss <= 1.05 * grown_from + (8 << 20)
        await canary.call.done_writing()
        await canary.end()
        for _ in range(100):
            await cloud.engine.idle()
            if cloud.engine.runner.cache.free_pages == 200:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("pages leaked")


async def test_fuzz_a_thousand_messages(tiny_llama: Path) -> None:
    await bombard(tiny_llama, total=1_000, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
async def test_fuzz_twenty_thousand_messages(tiny_llama: Path, seed: int) -> None:
    await bombard(tiny_llama, total=20_000, seed=seed)
