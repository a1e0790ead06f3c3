"""An HTTP server that answers one HatDeployment's query as Prometheus does, or as it is told to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

CLOUD = {"hat_component": "cloud", "pod": "chat-cloud-0", "instance": "127.0.0.1:44231"}
EDGE = {
    "hat_component": "edge",
    "hat_device": "jetson-1",
    "pod": "chat-edge-0",
    "instance": "127.0.0.1:34125",
}
AGE = {"hat_age": "1"}
COST = "hat_cloud_cost_seconds"


def sample(labels: dict[str, str], value: str, **more: str) -> dict[str, Any]:
    return {"metric": {**labels, **more}, "value": [1764409087.452, value]}


def vector(*samples: Any) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": samples}}).encode()


# As Prometheus 2.42 writes it.
WHOLE = [
    sample(CLOUD | AGE, "0.45199990272521973"),
    sample(CLOUD, "0.0016", __name__=COST, term="fixed"),
    sample(CLOUD, "2.5e-05", __name__=COST, term="per_token"),
    sample(CLOUD, "0", __name__=COST, term="per_cached"),
    sample(CLOUD, "1e-07", __name__=COST, term="per_pair"),
    sample(CLOUD, "0.00041", __name__="hat_step_wait_seconds"),
    sample(CLOUD, "1.25", __name__="hat_step_company_tokens"),
    sample(CLOUD, "512", __name__="hat_pass_prompt_tokens"),
    sample(EDGE | AGE, "0.9"),
    sample(EDGE, "2.1", __name__="hat_cloud_contact_age_seconds"),
    sample(EDGE, "128", __name__="hat_chunk_size_tokens"),
    sample(EDGE, "2.5e+06", __name__="hat_link_uplink_bytes_per_second"),
    sample(EDGE, "0.021", __name__="hat_link_rtt_seconds"),
    sample(EDGE, "5e-05", __name__="hat_shallow_token_seconds"),
    sample(EDGE, "1152", __name__="hat_prompt_row_bytes"),
    sample(EDGE, "0", __name__="hat_acceptance_ratio"),
]


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers as it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.answer: Answer = self.whole
        self.url = ""

    def tells(self, *samples: Any) -> None:
        """From now on this is the answer."""

        async def answer(_: web.Request) -> web.StreamResponse:
            return web.Response(body=vector(*samples), content_type="application/json")

        self.answer = answer

    async def whole(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=vector(*WHOLE), content_type="application/json")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.answer(request)


@asynccontextmanager
async def serving(context: Any = None) -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_get("/prom/api/v1/query", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    server.url = f"http{'s' if context else ''}://127.0.0.1:{runner.addresses[0][1]}/prom"
    try:
        yield server
    finally:
        await runner.cleanup()
