"""A relay between a real device and a real cloud that rewrites, drops or reorders what each says to the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

Rewrite = Callable[[Message], Iterator[bytes]]


class Relay(grpc.GenericRpcHandler):
    """hat.v1.Runtime that forwards to another one and rewrites every message on the way."""

    def __init__(self, channel: grpc.aio.Channel, rewrite: Rewrite) -> None:
        self._describe: Any = channel.unary_unary("/hat.v1.Runtime/Describe")
        self._session: Any = channel.stream_stream("/hat.v1.Runtime/Session")
        self._rewrite = rewrite

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method.endswith("/Describe"):
            return grpc.unary_unary_rpc_method_handler(self._forward_describe)
        return grpc.stream_stream_rpc_method_handler(self._forward_session)

    async def _forward_describe(self, request: bytes, context: Any) -> bytes:
        asked = next(self._rewrite(pb.DescribeRequest.FromString(request)))
        return next(self._rewrite(pb.DescribeReply.FromString(await self._describe(asked))))

    async def _forward_session(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async def rewritten() -> AsyncIterator[bytes]:
            async for request in requests:
                for message in self._rewrite(pb.DeviceMessage.FromString(request)):
                    yield message

        call = self._session(rewritten())
        try:
            async for reply in call:
                for message in self._rewrite(pb.CloudMessage.FromString(reply)):
                    yield message
        finally:
            call.cancel()  # else a call with unread messages lives until it is collected


@asynccontextmanager
async def relay(to: str, rewrite: Rewrite) -> AsyncIterator[str]:
    """The address of a relay to the cloud at `to`."""
    async with grpc.aio.insecure_channel(to) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Relay(channel, rewrite),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)
