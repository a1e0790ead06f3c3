"""Who is at the other end of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from hat_runtime.proto.hat.v1 import runtime_pb2 as pb


@dataclass(frozen=True)
class Peer:
    """The device of a stream and who pays for it."""

    tenant: str = ""
    """"" where nobody is named."""
    device: str = ""
    """"" where the device does not name itself."""
    verified: bool = False
    """Both names are those of a certificate that the cloud trusts; otherwise they are what the device says."""


def peer_of(opening: pb.Open, context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """The peer that opens a session.

    Args:
        opening: the stream's first message.
        context: the call's, which knows the certificate of the connection if there is one.
    """
    return Peer(tenant=opening.tenant, device=opening.device)
