"""The gRPC channels to one cloud: one, and for as long as streams live on it, the one with the certificate before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc

from hat_runtime.proto.hat.v1 import runtime_pb2_grpc
from hat_runtime.security.exposure import is_loopback
from hat_runtime.security.folder import Material, TlsFolder
from hat_runtime.security.tls import client_channel
from hat_runtime.wire.frames import MAX_MESSAGE_BYTES


class _Channel:
    def __init__(self, address: str, material: Material | None, keepalive_s: float) -> None:
        options = _options(address, keepalive_s)
        self.material = material
        self.users = 0
        self.retired = False
        self.channel = (
            grpc.aio.insecure_channel(address, options=options)
            if material is None
            else client_channel(address, material, options)
        )
        self.stub = runtime_pb2_grpc.RuntimeStub(self.channel)  # type: ignore[no-untyped-call]


class Lease:
    """The right to a channel until `release`."""

    def __init__(self, channels: Channels, channel: _Channel) -> None:
        self._channels = channels
        self._channel: _Channel | None = channel
        self.stub = channel.stub
        """hat.v1.Runtime on that channel."""
        channel.users += 1

    def release(self) -> None:
        """Give it up; again does no harm."""
        if (channel := self._channel) is not None:
            self._channel = None
            channel.users -= 1
            self._channels.drop_unused()


class Channels:
    """Connects lazily. For the event loop that made it."""

    def __init__(self, address: str, folder: TlsFolder | None, keepalive_s: float) -> None:
        """To the cloud at `address` ("HOST:PORT"), with the certificates of `folder`; None: without TLS.

        After `keepalive_s` seconds without a sign of life a connection is tried with a ping.
        """
        self._address = address
        self._folder = folder
        self._keepalive_s = keepalive_s
        self._newest = self._channel(self.material)
        self._retired: list[_Channel] = []
        self._closing: set[asyncio.Task[None]] = set()

    def _channel(self, material: Material | None) -> _Channel:
        return _Channel(self._address, material, self._keepalive_s)

    @property
    def newest(self) -> Material | None:
        """What the channel for new streams was made with; None: without TLS."""
        return self._newest.material

    @property
    def retired(self) -> int:
        """Channels with an earlier certificate on which streams still live."""
        return len(self._retired)

    @property
    def material(self) -> Material | None:
        """What new connections are made with; None: without TLS."""
        return None if self._folder is None else self._folder.current()

    def lease(self) -> Lease:
        """The channel with the newest certificate, to be given back by `Lease.release`."""
        material = self.material
        if material != self._newest.material:
            self._retired.append(self._newest)
            self._newest = self._channel(material)
            self.drop_unused()
        return Lease(self, self._newest)

    @contextlib.contextmanager
    def leased(self) -> Iterator[Lease]:
        """A lease for one call."""
        lease = self.lease()
        try:
            yield lease
        finally:
            lease.release()

    def drop_unused(self) -> None:
        """Close channels of earlier certificates that nobody uses any more."""
        for channel in [one for one in self._retired if not one.users]:
            self._retired.remove(channel)
            task = asyncio.get_running_loop().create_task(channel.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all of them, and with them what still runs on them."""
        channels, self._retired = [self._newest, *self._retired], []
        await asyncio.gather(*(one.channel.close() for one in channels), *self._closing)


def _options(address: str, keepalive_s: float) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # NAT boxes forget idle connections; the server accepts a ping every 10 s.
        ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive_s * 500)),
        # Else gRPC waits a minute for a ping's answer, whatever is above.
        ("grpc.http2.ping_timeout_ms", round(keepalive_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # After an outage the next request should find the cloud soon, not after gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Longest wait for one connection to be made: what does not answer may be there again at the next try.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # A connection of its own for each channel: with another certificate, another connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_loopback(address.rpartition(":")[0]):
        options.append(("grpc.enable_http_proxy", 0))
    return options
