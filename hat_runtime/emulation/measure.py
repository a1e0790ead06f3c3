"""Rate and round-trip time of a link, seen by raw sockets: no gRPC, no server of ours, no model."""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hat_runtime.emulation.link import emulated_link
from hat_runtime.emulation.spec import LinkSpec

_HEADER = struct.Struct("!cQ")  # what the far end does, and with how many bytes
_ECHO, _SINK, _SOURCE = b"E", b"S", b"R"
_SECONDS = struct.Struct("!d")
_READ_BYTES = 64 * 1024


@dataclass(frozen=True)
class LinkMeasurement:
    """What a raw TCP socket gets out of a link."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    rtt_s: float
    """Round trip of one byte."""


@contextlib.contextmanager
def far_end() -> Iterator[str]:
    """A small server on loopback that echoes, swallows or sends bytes; yields its "HOST:PORT"."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_accept, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends the accept
            thread.join()


def measure_rtt(address: str, count: int = 30) -> float:
    """Median round-trip time of one byte to a `far_end` at `address`, seconds."""
    times: list[float] = []
    with _connect(address, _ECHO, 0) as connection:
        for _ in range(count + 1):
            start = time.perf_counter()
            connection.sendall(b"x")
            _receive(connection, 1)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_uplink(address: str, size: int, count: int = 3) -> float:
    """Median rate at which a `far_end` receives `size` bytes sent at once, bytes a second."""
    rates: list[float] = []
    for _ in range(count):
        with _connect(address, _SINK, size) as connection:
            connection.sendall(bytes(size))
            rates.append(_SECONDS.unpack(_receive(connection, _SECONDS.size))[0])
    return statistics.median(rates)


def measure_downlink(address: str, size: int, count: int = 3) -> float:
    """Median rate at which `size` bytes come down from a `far_end`, bytes a second."""
    rates: list[float] = []
    for _ in range(count):
        with _connect(address, _SOURCE, size) as connection:
            rates.append(_receiving_rate(connection, size))
    return statistics.median(rates)


def measure_link(link: LinkSpec, seconds: float = 0.4) -> LinkMeasurement:
    """Emulate `link` and measure it: each rate by transfers of about `seconds` at the nominal rate."""
    size = int(min(max(link.rate_bytes_per_s * seconds, 50_000), 64 << 20))
    with far_end() as server, emulated_link(server, link) as running:
        return LinkMeasurement(
            up_bytes_per_s=measure_uplink(running.address, size),
            down_bytes_per_s=measure_downlink(running.address, size),
            rtt_s=measure_rtt(running.address),
        )


def _connect(address: str, what: bytes, size: int) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_HEADER.pack(what, size))
    return connection


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError(f"connection closed after {len(data)} of {size} bytes")
        data += part
    return bytes(data)


def _receiving_rate(connection: socket.socket, size: int) -> float:
    """Bytes a second from the first arrival to the last; the first arrival only starts the clock."""
    first = received = len(connection.recv(_READ_BYTES))
    start = end = time.perf_counter()
    while received < size:
        part = connection.recv(_READ_BYTES)
        if not part:
            raise ConnectionError(f"connection closed after {received} of {size} bytes")
        received += len(part)
        end = time.perf_counter()
    return (received - first) / (end - start) if end > start else float("inf")


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, contextlib.suppress(OSError):
        what, size = _HEADER.unpack(_receive(connection, _HEADER.size))
        if what == _ECHO:
            while data := connection.recv(_READ_BYTES):
                connection.sendall(data)
        elif what == _SINK:
            connection.sendall(_SECONDS.pack(_receiving_rate(connection, size)))
        elif what == _SOURCE:
            connection.sendall(bytes(size))
