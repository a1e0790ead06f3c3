"""The cloud's HTTP side.

Health, readiness and metrics for everybody; for its operator the list of devices, the policy of chunk sizes and the
deny-list.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hat_runtime.cloud.access import Access, Denied
from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.cloud.documents import DocumentStore, OlderDocument
from hat_runtime.cloud.policy import PolicyStore
from hat_runtime.errors import FieldError
from hat_runtime.security.folder import identity_of, why_not_valid
from hat_runtime.security.https import client_certificate
from hat_runtime.security.spiffe import OPERATOR, IdentityError

log = logging.getLogger(__name__)


def health_routes(
    registry: CollectorRegistry, why_not_ready: Callable[[], str | None]
) -> Sequence[BaseRoute]:
    """What kubelet and Prometheus ask for.

    /healthz answers 200 while the process works, /readyz 200 when it serves and 503 with the reason when it does not,
    /metrics in Prometheus' text format.

    Args:
        registry: whose metrics are shown.
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

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def control_routes(
    devices: DeviceTable, policy: PolicyStore, tuning: Callable[[], Mapping[str, Any]]
) -> Sequence[BaseRoute]:
    """What the operator reads and writes.

    /v1/devices is a row of figures for each device and what `tuning` gives. /v1/policy shows the policy in effect and
    takes another one by PUT: 200 with it, 400 names the field that is wrong, 409 says that it is not newer, 413 that it
    is too long.

    Args:
        devices: who was heard lately.
        policy: of chunk sizes.
        tuning: further facts for those who choose chunk sizes.
    """

    async def device_rows(_: Request) -> Response:
        return JSONResponse({"devices": devices.rows(), "policy_version": policy.current.version, **tuning()})

    return [Route("/v1/devices", device_rows), *_document("policy", policy)]


def denied_routes(denied: Denied) -> Sequence[BaseRoute]:
    """/v1/denied: shows and takes the deny-list, in the manner of /v1/policy."""
    return _document("denied", denied)


def operators_only(app: ASGIApp, access: Access) -> ASGIApp:
    """`app` for those whose certificate is that of an operator of the cloud's own tenant; 403 for all others."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            certificate = client_certificate(scope)
            identity = identity_of(certificate)
            reason = access.why_not(identity, certificate.serial_number, OPERATOR)
            if (invalid := why_not_valid(certificate)) is not None:  # TLS looked when the connection began
                reason = f"the certificate is of no use: {invalid}"
            shown = str(identity)
        except (ValueError, IdentityError) as error:
            reason, shown = str(error), ""
        if reason is not None:
            log.warning("%r of the admin port refused: %s", scope["path"], reason)
            await _refusal(403, "certificate", shown, reason)(scope, receive, send)
            return
        await app(scope, receive, send)

    return checked


def _document(name: str, store: DocumentStore[Any]) -> Sequence[BaseRoute]:
    """GET and PUT of /v1/NAME, a JSON text."""

    def reply(text: str) -> Response:
        return Response(text, media_type="application/json")

    async def get(_: Request) -> Response:
        return reply(store.current.to_json())

    async def take(request: Request) -> Response:
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > store.longest:
                    return _refusal(413, name, f"more than {store.longest} bytes", "is too long")
        except ClientDisconnect:
            return _refusal(400, name, f"{len(body)} bytes", "is not complete: the connection ended")
        try:
            return reply(store.put(bytes(body)).to_json())
        except FieldError as error:
            return _refusal(400, error.path, error.shown, str(error))
        except OlderDocument as error:
            return _refusal(409, "version", str(store.current.version), str(error))

    return [Route(f"/v1/{name}", get, methods=["GET"]), Route(f"/v1/{name}", take, methods=["PUT"])]


def _refusal(status: int, field: str, value: str, message: str) -> Response:
    error = {"field": field, "value": value, "message": message}
    return JSONResponse({"error": error}, status_code=status)
