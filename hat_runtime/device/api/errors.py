"""Errors of the HTTP API, in OpenAI's format."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from starlette.responses import JSONResponse

from hat_runtime.device.refusals import DeviceForbidden
from hat_runtime.device.submodels import DeviceFull
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HandshakeError, UsageError
from hat_runtime.log import request_id

log = logging.getLogger(__name__)

RETRY_S = 5
"""Retry-After where nobody has said when."""

CLIENT_GONE = 499
"""Status in logs and metrics for a client that went away before its reply (nginx's number)."""

_LONGEST_ECHO = 80

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A reply that is not 200.

    Args:
        status: HTTP status.
        message: for a person; names what was wrong and echoes the value.
        param: the request's field, as in "messages[1].content".
        code: for programs, as OpenAI has them.
        retry_after_s: when it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, with the request's id added."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {
            "message": _printable(self.message),
            "type": kind,
            "param": None if self.param is None else _printable(self.param),
            "code": self.code,
            "request_id": request_id.get(),
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(self.body(), self.status, self.headers)


def from_exception(error: BaseException) -> ApiError:
    """What a client is told about an exception. One that nobody expected is logged here, and only here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, CloudOverloaded):
        return ApiError(429, str(error), code="overloaded", retry_after_s=error.retry_after_s or RETRY_S)
    if isinstance(error, DeviceFull):
        return ApiError(429, str(error), code="overloaded", retry_after_s=RETRY_S)
    if isinstance(error, CloudUnavailable):
        return ApiError(
            503, str(error), code="cloud_unavailable", retry_after_s=error.retry_after_s or RETRY_S
        )
    if isinstance(error, HandshakeError):
        return ApiError(503, str(error), code="model_mismatch")
    if isinstance(error, DeviceForbidden):
        return ApiError(503, str(error), code="device_forbidden")
    log.error("a request failed", exc_info=error)
    return ApiError(
        500,
        f"internal error on the device; its log has the details under {request_id.get()}",
        code="internal",
    )


def echo(value: object) -> str:
    """A request's value as JSON, shortened, to show it back to whoever sent it."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}..."


def _printable(text: str) -> str:
    # JSON may carry half a surrogate pair, which cannot be sent back as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()
