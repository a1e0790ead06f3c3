"""The cloud's HTTP side: health, readiness, metrics and the list of devices."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hat_runtime.cloud.devices import DeviceTable


def make_admin_app(
    registry: CollectorRegistry, why_not_ready: Callable[[], str | None], devices: DeviceTable
) -> Starlette:
    """The app behind --http-listen.

    /healthz answers 200 while the process works, /readyz 200 when it serves and 503 with the reason when it does not,
    /metrics in Prometheus' text format, /v1/devices a row of figures for each device.

    Args:
        registry: whose metrics are shown.
        why_not_ready: None when ready, else the reason.
        devices: who was heard lately.
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

    async def device_rows(_: Request) -> Response:
        return JSONResponse({"devices": devices.rows()})

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/v1/devices", device_rows),
        ]
    )
