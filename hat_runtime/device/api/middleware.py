"""Around every request: its id, its access log line, its count."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hat_runtime.device.api.errors import CLIENT_GONE, from_exception
from hat_runtime.log import request_id, sane_request_id

log = logging.getLogger("hat_runtime.access")

REQUEST_ID_HEADER = "X-Request-ID"
_QUIET = ("/healthz", "/readyz", "/metrics", "/v1/hat/stats")


class RequestScope:
    """The outermost ASGI layer.

    Endpoints leave in the scope what they know for the log: "hat.usage" (OpenAI's usage object) and "hat.failed" (the
    status of an error that came after the reply had begun).
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter(
            "hat_http_requests",
            "HTTP requests by route and final status.",
            ["route", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        identity = sane_request_id(given) or uuid.uuid4().hex
        token = request_id.set(identity)
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = identity
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            failure = from_exception(error)
            scope["hat.failed"] = failure.status
            if status == 0:
                await failure.response()(scope, receive, send_with_id)
        finally:
            self._account(scope, scope.get("hat.failed") or status or CLIENT_GONE, time.monotonic() - began)
            request_id.reset(token)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(
            route, "path", "other"
        )  # never the raw path: it may hold anything, and series are bounded
        self._requests.labels(path, str(status)).inc()
        usage: dict[str, Any] | None = scope.get("hat.usage")
        figures = ""
        if usage is not None:
            ttft = usage["hat"]["ttft_s"]
            figures = (
                f" prompt_tokens={usage['prompt_tokens']} completion_tokens={usage['completion_tokens']}"
                f" ttft_s={'-' if ttft is None else f'{ttft:.3f}'}"
            )
        level = logging.DEBUG if path in _QUIET else logging.INFO
        log.log(level, "%s %s status=%d%s total_s=%.3f", scope["method"], path, status, figures, seconds)
