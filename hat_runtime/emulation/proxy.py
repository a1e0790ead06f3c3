"""A slow link in user space: a TCP proxy with a rate, a round-trip time and faults on demand.

Each direction is one serialiser that all connections share, because the rate belongs to the link and not to a
connection: departure = max(now, next_free) + bytes / rate, arrival = departure + RTT / 2. TCP's own handshake and
slow start are not emulated: this is a link with warm connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import selectors
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError

QUEUE_S = 0.005
"""How far ahead the link is filled, seconds. A sleep that ends late must not leave it idle."""

RECEIVE_BUFFER_BYTES = 64 * 1024
"""Small, so that a full link holds the sender back; much smaller makes TCP on loopback stall for 40 ms at a time."""

MAX_CONNECTIONS = 400
"""select() watches file descriptors below 1,024, and a connection has two."""

_PR_SET_TIMERSLACK = 29


class Direction:
    """One way of the link."""

    def __init__(self, link: LinkSpec) -> None:
        self.link = link
        self.stalled_until = 0.0
        self.bytes = 0
        self._next_free = 0.0
        self._turn = asyncio.Lock()

    @property
    def quantum(self) -> int:
        """Bytes that a connection may send at once: about 1 ms of the rate, so that connections share it evenly."""
        return int(min(max(self.link.rate_bytes_per_s * 1e-3, 1500), 64 * 1024))

    @property
    def in_flight_limit(self) -> int:
        """Bytes of one connection that may be under way before it is read no further."""
        delay = self.link.rtt_s / 2 + self.link.jitter_s + QUEUE_S
        return max(256 * 1024, int(2 * delay * self.link.rate_bytes_per_s))

    async def transmit(self, size: int, ready: float) -> float:
        """Take the link for `size` bytes that were there at time `ready`; returns when they arrive at the far end.

        Times are of the loop's clock, in seconds. That `ready` may be past keeps the link busy on a machine that lets
        this process run late.
        """
        clock = asyncio.get_running_loop().time
        async with self._turn:  # first come, first served
            while (ahead := max(self._next_free - QUEUE_S, self.stalled_until) - clock()) > 0:  # noqa: ASYNC110 (a time)
                await asyncio.sleep(ahead)
            self._next_free = (
                max(ready, self._next_free, self.stalled_until) + size / self.link.rate_bytes_per_s
            )
            self.bytes += size
            return self._next_free + self.link.rtt_s / 2 + random.uniform(0, self.link.jitter_s)

    async def hold_until(self, arrival: float) -> None:
        """Sleep until `arrival`, and through a stall."""
        clock = asyncio.get_running_loop().time
        while (wait := max(arrival, self.stalled_until) - clock()) > 0:  # noqa: ASYNC110 (a time)
            # A processor that slept long wakes up late; the last millisecond is slept apart.
            await asyncio.sleep(wait - 0.001 if wait > 0.002 else wait)


class LinkProxy:
    """Listens, and carries every connection over the emulated link. Everything runs in one event loop."""

    def __init__(self, upstream: tuple[str, int], link: LinkSpec) -> None:
        self.up = Direction(link)
        self.down = Direction(link)
        self._upstream = upstream
        self._connections: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self._frozen: set[asyncio.Task[None]] = set()
        self._down_until = 0.0
        self._dropping: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen; returns "HOST:PORT" with the real port.

        Raises:
            HatError: the address is taken or not ours.
        """
        loop = asyncio.get_running_loop()
        try:
            family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it; later it would not bound the window any more.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            raise HatError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0 for a free one"
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self._acceptor = asyncio.create_task(self._accept(listener))
        return f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    def set_link(self, link: LinkSpec) -> None:
        """Change rate and times; bytes already on the link keep theirs."""
        self.up.link = self.down.link = link

    def cut(self) -> None:
        """Reset all connections, as a link that breaks; new ones are accepted."""
        for task in self._connections:
            task.cancel()

    def outage(self, seconds: float) -> None:
        """Reset all connections, and for this long each new one."""
        self._down_until = asyncio.get_running_loop().time() + seconds
        self.cut()

    def freeze(self) -> None:
        """Leave all connections half-open: nothing comes through any more, and neither end is told. New ones work."""
        for task in self._connections - self._frozen:
            self._frozen.add(task)
            task.cancel()

    def drop(self, share: float, seed: int = 0) -> None:
        """From now on reset this share of the connections, drawn by chance, every 100 ms; 0: none."""
        if self._dropping is not None:
            self._dropping.cancel()
        self._dropping = asyncio.create_task(self._drop(share, random.Random(seed))) if share else None

    async def _drop(self, share: float, chance: random.Random) -> None:
        while True:
            await asyncio.sleep(0.1)
            for task in self._connections:
                if chance.random() < share:
                    task.cancel()

    def stall(self, seconds: float) -> None:
        """Let nothing through in either direction for this long; connections stay open."""
        until = asyncio.get_running_loop().time() + seconds
        self.up.stalled_until = self.down.stalled_until = until

    async def close(self) -> None:
        """Stop listening and reset all connections."""
        self.drop(0)
        self.cut()
        tasks = list(self._connections)
        if self._acceptor is not None:
            self._acceptor.cancel()
            tasks.append(self._acceptor)
        await asyncio.gather(*tasks, return_exceptions=True)  # a socket is closed only when nobody watches it
        if self._listener is not None:
            self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            if len(self._connections) >= MAX_CONNECTIONS:
                client.close()
                continue
            task = asyncio.create_task(self._carry(client))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            task.add_done_callback(self._frozen.discard)

    async def _carry(self, client: socket.socket) -> None:
        """One connection, until both sides have closed their half or one has gone."""
        loop = asyncio.get_running_loop()
        server: socket.socket | None = None
        try:
            if loop.time() < self._down_until:
                raise ConnectionResetError
            host, port = self._upstream
            family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            server = socket.socket(family, socket.SOCK_STREAM)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(server, address)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(client, server, self.up))
                both.create_task(_pump(server, client, self.down))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            if asyncio.current_task() in self._frozen:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()  # until it is cut
            # Refused, reset or cut: both ends learn it at once, by a reset.
            for end in filter(None, (client, server)):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            client.close()
            if server is not None:
                server.close()


async def _pump(source: socket.socket, sink: socket.socket, way: Direction) -> None:
    """Carry one direction of one connection; ends when the source has closed its half and the sink has it all."""
    loop = asyncio.get_running_loop()
    in_flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    space = asyncio.Event()
    pending = 0

    async def deliver() -> None:
        nonlocal pending
        while True:
            arrival, data = await in_flight.get()
            await way.hold_until(arrival)
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(sink, data)
            pending -= len(data)
            space.set()

    async def read() -> None:
        nonlocal pending
        last = 0.0  # jitter must not reorder
        asked = loop.time()
        while True:
            if pending > way.in_flight_limit:
                while pending > way.in_flight_limit:
                    space.clear()
                    await space.wait()
                asked = loop.time()
            try:
                data = source.recv(way.quantum)
                # It may have come at any time since we last looked.
                ready, asked = asked, loop.time()
            except BlockingIOError:
                data = await loop.sock_recv(source, way.quantum)
                ready = asked = loop.time()
            last = max(last, await way.transmit(len(data), ready))
            pending += len(data)
            in_flight.put_nowait((last, data))
            if not data:
                return

    async with asyncio.TaskGroup() as halves:
        halves.create_task(deliver())
        halves.create_task(read())


def run_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine on an event loop whose timers are exact to microseconds.

    asyncio's default selector, epoll, rounds every timeout up to a whole millisecond.
    """
    _ask_for_punctual_timers()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())


def serve(
    listen: tuple[str, int], upstream: tuple[str, int], link: LinkSpec, ready: Callable[[str], None]
) -> None:
    """Serve the link in this process until Ctrl-C; `ready` gets the address that it listens on.

    Raises:
        HatError: cannot listen there.
    """

    async def main() -> None:
        proxy = LinkProxy(upstream, link)
        ready(await proxy.start(*listen))
        try:
            await asyncio.Event().wait()
        finally:
            await proxy.close()

    run_loop(main)


def _ask_for_punctual_timers() -> None:
    """Timer slack 1 us instead of 50 us, and a place before busy processes where the system lets us have it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
