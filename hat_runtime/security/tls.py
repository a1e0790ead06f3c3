"""Everything that depends on how gRPC for Python does TLS (seen with grpcio 1.85).

A client cannot look at the other side's certificate there: it can only demand one name among its DNS names. That is why
a cloud's certificate has a DNS name made of tenant and trust domain (spiffe.py). A server that refuses a client's
certificate sends no reason: the client sees a closed socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import grpc
from cryptography import x509

from hat_runtime.security.folder import Material, TlsFolder

_CERTIFICATE_PROPERTY = "x509_pem_cert"

Context = grpc.aio.ServicerContext[Any, Any]

# What gRPC's text of a failed handshake contains, and what it means for the device that dialled.
_FAULTS = (
    ("certificate has expired", "the cloud's certificate has expired: have it renewed, or correct the clock here"),
    ("certificate is not yet valid", "the cloud's certificate is not valid yet: correct the clock here or there"),
    ("unsupported certificate purpose", "who answers there is not a cloud: its certificate is for clients"),
    ("Hostname Verification Check failed", "who answers there is not a cloud of {cloud}"),
    ("WRONG_VERSION_NUMBER", "there is no TLS at this address: start the cloud with --tls, or correct --cloud"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the cloud's certificate was not signed by an authority in ca.crt of --tls: both sides need the same authority",
    ),
)  # fmt: skip
_NO_CONNECTION = "failed to connect"
_CLOSED = ("Socket closed", "Connection reset", "Broken pipe", "EOF")


def server_credentials(folder: TlsFolder) -> grpc.ServerCredentials:
    """Of a server that takes only clients with a certificate; each handshake uses the folder's newest files."""
    used = folder.current()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        found = folder.current()
        if found == used:
            return None
        used = found
        return _configuration(found)

    # types-grpcio does not know that None says "as before".
    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], newest)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(used), fetch, require_client_authentication=True
    )


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.chain)], root_certificates=material.authorities
    )


def client_channel(address: str, material: Material, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
    """A channel to a cloud of the tenant and trust domain in `material`; any other fails in the handshake.

    Args:
        address: "HOST:PORT".
        material: who dials.
        options: further ones of the channel.
    """
    credentials = grpc.ssl_channel_credentials(material.authorities, material.key, material.chain)
    name = ("grpc.ssl_target_name_override", material.identity.cloud_dns_name)
    return grpc.aio.secure_channel(address, credentials, options=[*options, name])


def peer_certificate(context: Context) -> x509.Certificate | None:
    """The client's certificate, which the handshake has checked; None on a connection without one.

    Raises:
        ValueError: it cannot be read.
    """
    pem = context.auth_context().get(_CERTIFICATE_PROPERTY)
    return None if pem is None else x509.load_pem_x509_certificate(next(iter(pem)))


def connection_fault(details: str, material: Material | None) -> str | None:
    """What is wrong with a connection that could not be made, in words; None where certificates are not to blame.

    Args:
        details: of a call that ended with UNAVAILABLE.
        material: what the device dialled with; None: without TLS.
    """
    closed = _NO_CONNECTION in details and any(text in details for text in _CLOSED)
    if material is None:
        return "if the cloud runs with --tls, this side needs --tls too" if closed else None
    if (reason := material.why_not_valid()) is not None:
        return f"this device's certificate, {material.identity}, {_is(reason)}"
    for text, meaning in _FAULTS:
        if text in details:
            cloud = f"tenant {material.identity.tenant!r} of {material.identity.trust_domain}"
            return meaning.format(cloud=cloud)
    if closed:
        return (
            f"if this stays so, the cloud does not accept the certificate of {material.identity}: "
            "its ca.crt must hold the authority that signed it, and its clock must be right"
        )
    return None


def _is(reason: str) -> str:
    return reason if reason.startswith("expired") else f"is {reason}"
