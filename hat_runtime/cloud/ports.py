"""The cloud's ports: who may come to each."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from hat_runtime.cloud.access import Access
from hat_runtime.cloud.admin import denied_routes, operators_only
from hat_runtime.errors import HatError
from hat_runtime.http import bind, serving
from hat_runtime.security.tls import server_credentials


def add_grpc_port(server: grpc.aio.Server, host: str, port: int, access: Access) -> int:
    """Let the server listen at host:port, with mutual TLS where there are certificates; the port (for 0: a free one).

    Raises:
        HatError: the address cannot be listened on.
    """
    address, folder = f"{host}:{port}", access.folder
    try:
        if folder is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(folder))
    except RuntimeError as error:
        raise HatError(f"--listen {address} cannot be listened on: {error}") from error


@asynccontextmanager
async def serving_http(
    health: Sequence[BaseRoute],
    control: Sequence[BaseRoute],
    bound: socket.socket,
    admin: tuple[str, int],
    access: Access,
) -> AsyncIterator[tuple[str, str]]:
    """Serve health and control; gives the base URLs of both.

    Without TLS both are on one port. With it control, to which the deny-list belongs, is on a port for operators:
    kubelet and Prometheus, who ask for health, have no certificates.

    Args:
        health: routes for everybody.
        control: routes for the operator.
        bound: socket of the plain port.
        admin: host and port of the other one; with TLS only.
        access: who is an operator.

    Raises:
        HatError: the admin port cannot be listened on.
    """
    if access.folder is None:
        async with serving(Starlette(routes=[*health, *control]), bound) as url:
            yield url, url
        return
    guarded = operators_only(Starlette(routes=[*control, *denied_routes(access.denied)]), access)
    async with (
        serving(Starlette(routes=health), bound) as url,
        serving(guarded, bind(*admin, "--admin-listen"), tls=access.folder) as admin_url,
    ):
        yield url, admin_url
