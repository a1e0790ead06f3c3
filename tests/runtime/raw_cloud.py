"""A cloud that computes nothing and says what a test tells it, also what no cloud should say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import torch

from hat_runtime.device.link import CloudLink
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import Binding
from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

WIDTH = 64


class RawCloud(grpc.GenericRpcHandler):
    """The other end of one session."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[pb.Step] = asyncio.Queue()
        """What the device sends."""
        self.left = asyncio.Event()
        """The device has ended the stream."""
        self._answers: asyncio.Queue[pb.CloudMessage] = asyncio.Queue()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(
            self._session,
            request_deserializer=pb.DeviceMessage.FromString,
            response_serializer=pb.CloudMessage.SerializeToString,
        )

    def answer(self, step: pb.Step, value: float = 0.0, *, stale: bool = False) -> None:
        """Send a Step's Result; all its deep states are `value`."""
        rows = {pb.WANT_NONE: 0, pb.WANT_LAST: 1, pb.WANT_ALL: step.n}[step.want] * (not stale)
        result = pb.Result(
            status=pb.STATUS_STALE if stale else pb.STATUS_OK,
            epoch=step.epoch,
            start_pos=step.start_pos,
            n=step.n,
            payload=torch.full((rows, WIDTH), value).numpy().tobytes(),
        )
        self._answers.put_nowait(pb.CloudMessage(result=result))

    async def _session(
        self, requests: AsyncIterator[pb.DeviceMessage], context: Any
    ) -> AsyncIterator[pb.CloudMessage]:
        async def listen() -> None:
            async for message in requests:
                if message.WhichOneof("message") == "step":
                    self.steps.put_nowait(message.step)

        listening = asyncio.create_task(listen())
        try:
            yield pb.CloudMessage(opened=pb.Opened(session_id="raw"))
            while True:
                yield await self._answers.get()
        finally:
            listening.cancel()
            self.left.set()


@asynccontextmanager
async def raw_session() -> AsyncIterator[tuple[CloudSession, RawCloud]]:
    """A device's session, and the cloud that it talks to."""
    cloud, server = RawCloud(), grpc.aio.server()
    server.add_generic_rpc_handlers((cloud,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = CloudLink(f"127.0.0.1:{port}")
    try:
        yield link.open_session(Binding("0" * 64, LayerRange(2, 6), torch.float32, WIDTH)), cloud
    finally:
        await link.close()
        await server.stop(0)
