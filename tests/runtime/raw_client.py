"""A client that speaks the session protocol message by message, so that tests can also speak it wrongly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch

from hat_runtime.cloud.serve import RunningCloud
from hat_runtime.model.attention import make_backend
from hat_runtime.model.hf import load_decoder_slice, load_device_ends
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment, make_cache
from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc


class RawSession:
    """One stream."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.notices: list[pb.Notice] = []

    async def send(self, message: pb.DeviceMessage) -> None:
        await self.call.write(message)

    async def step(self, start: int, hidden: torch.Tensor, want: int = pb.WANT_ALL, **fields: Any) -> None:
        step = {"epoch": 0, "start_pos": start, "n": len(hidden), "want": want, "payload": to_bytes(hidden)}
        await self.send(pb.DeviceMessage(step=pb.Step(**(step | fields))))

    async def result(self) -> pb.Result:
        """The next Result, its frames joined; notices are kept aside."""
        payload = b""
        while True:
            message = await self.call.read()
            if message is grpc.aio.EOF:
                code, details = await self.call.code(), await self.call.details()
                raise AssertionError(f"stream ended: {code} {details}")
            if message.WhichOneof("message") == "notice":
                self.notices.append(message.notice)
                continue
            payload += message.result.payload
            if not message.result.more:
                message.result.payload = payload
                return message.result

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Read until the stream ends; its status."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return await self.call.code(), await self.call.details()


def to_bytes(hidden: torch.Tensor) -> bytes:
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()


def states(result: pb.Result, width: int = 64) -> torch.Tensor:
    """Deep states float32 [rows, width] of a Result."""
    return torch.frombuffer(bytearray(result.payload), dtype=torch.float32).view(-1, width)


def opening(cloud: RunningCloud, **fields: Any) -> pb.DeviceMessage:
    """A correct Open for this cloud, changed by `fields`."""
    identity = cloud.identity
    right = {
        "model_revision": identity.model_revision,
        "lo": identity.lo,
        "hi": identity.hi,
        "dtype": identity.dtype,
        "codec": "raw",
    }
    return pb.DeviceMessage(open=pb.Open(**(right | fields)))


@asynccontextmanager
async def channel_to(cloud: RunningCloud) -> AsyncIterator[rpc.RuntimeStub]:
    options = (("grpc.max_receive_message_length", 1 << 20),)
    async with grpc.aio.insecure_channel(cloud.address, options=options) as channel:
        yield rpc.RuntimeStub(channel)


async def open_session(stub: rpc.RuntimeStub, cloud: RunningCloud, **fields: Any) -> RawSession:
    session = RawSession(stub.Session())
    await session.send(opening(cloud, **fields))
    message = await session.call.read()
    assert message.WhichOneof("message") == "opened", message
    return session


async def all_pages_back(cloud: RunningCloud) -> None:
    """Streams end on both sides at slightly different times: wait, then everything must be free."""
    cache = cloud.engine.runner.cache
    for _ in range(250):
        await cloud.engine.idle()
        if cache.free_pages == cache.num_pages:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{cache.num_pages - cache.free_pages} pages leaked")


@dataclass
class LocalSplit:
    """Both sides of a tiny model in this process: what the cloud should answer, without a cloud."""

    folder: Path
    input_layers: int = 2
    layers: int = 6
    runners: list[LayerRunner] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ends = load_device_ends(self.folder, torch.float32)
        for span in (LayerRange(0, self.input_layers), LayerRange(self.input_layers, self.layers)):
            part = load_decoder_slice(self.folder, span, torch.float32)
            self.runners.append(
                LayerRunner(part, make_cache(part, num_pages=64, page_tokens=16), make_backend("sdpa"))
            )

    def shallow(self, ids: torch.Tensor) -> torch.Tensor:
        """Shallow states [T, hidden] of a whole text."""
        return self._run(0, self.ends.embed(ids))

    def deep(self, shallow: torch.Tensor) -> torch.Tensor:
        """Deep states [T, hidden] of a whole text."""
        return self._run(1, shallow)

    def _run(self, side: int, hidden: torch.Tensor) -> torch.Tensor:
        sequence = PagedSequence()
        out = self.runners[side].run([Segment(sequence, 0, hidden)])[0]
        self.runners[side].cache.release(sequence)
        return out
