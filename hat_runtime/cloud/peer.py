"""Who is at the other end of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc

from hat_runtime.cloud.assembly import ProtocolError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.security.folder import identity_of
from hat_runtime.security.spiffe import IdentityError, SpiffeId
from hat_runtime.security.tls import peer_certificate

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Peer:
    """The device of a stream and who pays for it.

    Two are equal if they are the same device of the same tenant, whichever of its certificates each has shown: what one
    has begun the other may go on with. One that proves its names is never equal to one that does not.
    """

    tenant: str = ""
    """"" where nobody is named."""
    device: str = ""
    """"" where the device does not name itself."""
    verified: bool = False
    """Both names are those of a certificate that the cloud trusts; otherwise they are what the device says."""
    identity: SpiffeId | None = None
    """Of the certificate; its kind and trust domain are still to be checked (access.py)."""
    serial: int = field(default=0, compare=False)
    """Of the certificate."""
    expires: datetime | None = field(default=None, compare=False)
    """End of the certificate; None without one."""


def connected(context: Context) -> Peer:
    """The peer of a connection, as its certificate says; without TLS one that nobody knows.

    Raises:
        ProtocolError: PERMISSION_DENIED, the certificate names nobody.
    """
    try:
        certificate = peer_certificate(context)
        if certificate is None:
            return Peer()
        identity = identity_of(certificate)
    except (ValueError, IdentityError) as error:
        raise ProtocolError(f"certificate: {error}", grpc.StatusCode.PERMISSION_DENIED) from error
    return Peer(
        identity.tenant,
        identity.name,
        verified=True,
        identity=identity,
        serial=certificate.serial_number,
        expires=certificate.not_valid_after_utc,
    )


def peer_of(opening: pb.Open, context: Context) -> Peer:
    """The peer that opens a session.

    Args:
        opening: the stream's first message.
        context: the call's, which knows the certificate of the connection if there is one.

    Raises:
        ProtocolError: PERMISSION_DENIED, Open names another tenant or device than the certificate, or the certificate
            names nobody.
    """
    peer = connected(context)
    if not peer.verified:
        return Peer(tenant=opening.tenant, device=opening.device)
    for name, said, certified in (
        ("tenant", opening.tenant, peer.tenant),
        ("device", opening.device, peer.device),
    ):
        if said and said != certified:
            raise ProtocolError(
                f"Open.{name}: {said!r} is not the certificate's {certified!r}",
                grpc.StatusCode.PERMISSION_DENIED,
            )
    return peer
