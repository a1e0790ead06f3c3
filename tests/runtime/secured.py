"""A cloud with mutual TLS, and those who come to it."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.spiffe import DEVICE
from hat_runtime.security.tls import client_channel
from tests.certificates import Site


@asynccontextmanager
async def secured_cloud(
    model: Path, site: Site, tls: Path | None = None, **fields: Any
) -> AsyncIterator[RunningCloud]:
    small = {"input_layers": 2, "dtype": "float32", "kv_bytes": 16 << 20, "drain_s": 0.1}
    config = CloudConfig(model, tls=tls or site.cloud(), **(small | fields))
    async with running_cloud(config) as cloud:
        yield cloud


@asynccontextmanager
async def channel_as(cloud: RunningCloud, folder: Path, kind: str = DEVICE) -> AsyncIterator[rpc.RuntimeStub]:
    """The service, for who is in `folder`."""
    material = TlsFolder(folder, kind).current()
    async with client_channel(cloud.address, material, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield rpc.RuntimeStub(channel)


async def admin(
    cloud: RunningCloud, path: str, who: Path | None, body: object | None = None
) -> tuple[int, Any]:
    """GET, or PUT of `body` as JSON, at the admin port."""

    def ask() -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=None if who is None else who / "ca.crt")
        context.check_hostname = False  # urllib checks the address; the test asks at 127.0.0.1
        if who is None:
            context.verify_mode = ssl.CERT_NONE
        else:
            context.load_cert_chain(who / "tls.crt", who / "tls.key")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{cloud.admin_url}{path}", data, method="GET" if body is None else "PUT"
        )
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    return await asyncio.to_thread(ask)
