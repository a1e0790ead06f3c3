"""An HTTP server inside a running event loop, for both sides."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import uvicorn

from hat_runtime.errors import HatError
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.https import CertifiedH11, NewestFiles


def bind(host: str, port: int, option: str) -> socket.socket:
    """A TCP socket bound to host:port; port 0 takes a free one.

    Raises:
        HatError: the address is taken or is not this machine's; names `option`.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise HatError(f"{option} {host}:{port}: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise HatError(f"{option} {host}:{port} cannot be listened on: {error.strerror or error}") from error
    return bound


class _Server(uvicorn.Server):
    # Signals belong to whoever runs the loop, not to each server in it.
    def capture_signals(self) -> Any:
        return nullcontext()


@asynccontextmanager
async def serving(
    app: Callable[..., Any], bound: socket.socket, *, grace_s: float = 5.0, tls: TlsFolder | None = None
) -> AsyncIterator[str]:
    """Serve `app` on a bound socket; gives the base URL. On exit, open requests get `grace_s` seconds to end.

    With `tls` it is HTTPS for clients with a certificate, which security.https.client_certificate tells.
    """
    config = uvicorn.Config(
        app,
        http="auto" if tls is None else CertifiedH11,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    config.load()
    config.ssl = None if tls is None else NewestFiles.of(tls)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        while not server.started:
            if task.done():
                await task
                raise HatError("the HTTP server did not start; see the log")
            await asyncio.sleep(0.005)
        host, port = bound.getsockname()[:2]
        scheme = "http" if tls is None else "https"
        yield f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    finally:
        server.should_exit = True
        await task
