"""The cloud's HTTP side: health, readiness, metrics, the list of devices, and the policy of chunk sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.cloud.policy import OlderPolicy, PolicyStore
from hat_runtime.control.published import MAX_BYTES, PolicyError


def make_admin_app(
    registry: CollectorRegistry,
    why_not_ready: Callable[[], str | None],
    devices: DeviceTable,
    policy: PolicyStore,
    tuning: Callable[[], Mapping[str, Any]],
) -> Starlette:
    """The app behind --http-listen.

    /healthz answers 200 while the process works, /readyz 200 when it serves and 503 with the reason when it does not,
    /metrics in Prometheus' text format, /v1/devices a row of figures for each device and what `tuning` gives.
    /v1/policy shows the policy in effect and takes another one by PUT: 200 with it, 400 names the field that is wrong,
    409 says that it is not newer, 413 that it is too long.

    Args:
        registry: whose metrics are shown.
        why_not_ready: None when ready, else the reason.
        devices: who was heard lately.
        policy: of chunk sizes.
        tuning: further facts for those who choose chunk sizes.
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
        return JSONResponse({"devices": devices.rows(), "policy_version": policy.policy.version, **tuning()})

    async def show_policy(_: Request) -> Response:
        return Response(policy.policy.to_json(), media_type="application/json")

    async def put_policy(request: Request) -> Response:
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > MAX_BYTES:
                    return _refusal(413, "policy", f"more than {MAX_BYTES} bytes", "is too long")
        except ClientDisconnect:
            return _refusal(400, "policy", f"{len(body)} bytes", "is not complete: the connection ended")
        try:
            policy.put(bytes(body))
        except PolicyError as error:
            return _refusal(400, error.path, error.shown, str(error))
        except OlderPolicy as error:
            return _refusal(409, "version", str(policy.policy.version), str(error))
        return await show_policy(request)

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/v1/devices", device_rows),
            Route("/v1/policy", show_policy, methods=["GET"]),
            Route("/v1/policy", put_policy, methods=["PUT"]),
        ]
    )


def _refusal(status: int, field: str, value: str, message: str) -> Response:
    error = {"field": field, "value": value, "message": message}
    return JSONResponse({"error": error}, status_code=status)
