"""gRPC status codes in words for the person who runs the device."""

from __future__ import annotations

import grpc

from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HandshakeError, HatError, UsageError
from hat_runtime.security.folder import Material
from hat_runtime.security.tls import connection_fault

RETRY_PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata in which an overloaded cloud says when to try again."""


class CloudRefused(HatError):
    """The cloud ended a session because of what this device sent."""


class DeviceForbidden(HatError):
    """The cloud knows who this device is, and does not let it in."""


class SessionEnded(CloudUnavailable):
    """The cloud ended the session and holds nothing of it."""


class SessionUnknown(SessionEnded):
    """The cloud does not know the session that was to be resumed."""


def explain(error: grpc.aio.AioRpcError, address: str, material: Material | None = None) -> HatError:
    """The HatError for a failed call to the cloud at `address`, made with these certificates; None: without TLS."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE:
        advice = connection_fault(details, material) or (
            "check the address, that `hat cloud serve` runs there, and that no firewall is between"
        )
        return CloudUnavailable(
            f"the cloud at {address} cannot be reached or went away ({details}); {advice}",
            _retry_after_s(error),
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CloudUnavailable(
            f"the cloud at {address} did not answer in time; check that the address is a HAT cloud's gRPC port "
            "and that the link is not overloaded"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return CloudOverloaded(f"the cloud at {address} is full: {details}", _retry_after_s(error))
    if code is grpc.StatusCode.NOT_FOUND:
        return SessionUnknown(f"the cloud at {address} does not have the session any more: {details}")
    if code is grpc.StatusCode.ABORTED:
        text = f"the cloud at {address} ended the session: {details}"
        return SessionEnded(text, _retry_after_s(error))
    if code is grpc.StatusCode.CANCELLED or (code is grpc.StatusCode.UNKNOWN and "Stream removed" in details):
        return CloudUnavailable(f"the cloud at {address} ended the session: {details}", _retry_after_s(error))
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return UsageError(f"the cloud at {address}: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return HandshakeError(f"{address} does not speak HAT's session protocol ({details})")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return HandshakeError(f"the cloud at {address} does not fit this device: {details}")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return DeviceForbidden(f"the cloud at {address} does not let this device in: {details}")
    return CloudRefused(f"the cloud at {address} answered {code.name}: {details}")


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_PUSHBACK:
            text = value.decode() if isinstance(value, bytes) else value
            return int(text) / 1000 if text.isdigit() else None
    return None
