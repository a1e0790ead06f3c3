"""The cloud's HTTP side: health, readiness and metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def make_admin_app(registry: CollectorRegistry, why_not_ready: Callable[[], str | None]) -> Starlette:
    """The app behind --http-listen.

    /healthz answers 200 while the process works, /readyz 200 when it serves and 503 with the reason when it does not,
    /metrics in Prometheus' text format.

    Args:
        why_not_ready: None when ready, else the reason.
    """

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        reason = why_not_ready()
        return (
            PlainTextResponse("ready\n")
            if reason is None
            else PlainTextResponse(f"{reason}\n", status_code=503)
        )

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
    )
