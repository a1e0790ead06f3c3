"""Does a device that opens a session fit this cloud? Compared before any compute."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from hat_runtime.cloud import tokens
from hat_runtime.cloud.assembly import ProtocolError, check_padding
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec


@dataclass(frozen=True)
class Served:
    """What every handshake is compared with."""

    identity: pb.ModelIdentity
    limits: pb.Limits
    mode: str = ""
    """"" for hidden states, MODE of tokens.py for token ids."""
    vocab_size: int = 0
    tokenizer_id: str = ""

    @property
    def codecs(self) -> tuple[str, ...]:
        """What payloads may be encoded as, the preferred one first."""
        return (tokens.CODEC,) if self.mode else codec.CODECS


def check_fits(opening: pb.Open, served: Served) -> None:
    """Compare what a device says of itself with what this cloud serves.

    Raises:
        ProtocolError: names the first thing that differs, with both values.
    """
    identity, mismatch = served.identity, grpc.StatusCode.FAILED_PRECONDITION
    for field, device, cloud in (
        ("mode", opening.mode or "hat", served.mode or "hat"),
        ("model_revision", opening.model_revision, identity.model_revision),
        ("layers", f"{opening.lo}:{opening.hi}", f"{identity.lo}:{identity.hi}"),
        ("dtype", opening.dtype, identity.dtype),
    ):
        if device != cloud:
            raise ProtocolError(f"{field} {device!r} of the device is not the cloud's {cloud!r}", mismatch)
    codecs = codecs_of(opening)
    for field, name in (("codec", codecs.prompt), ("decode_codec", codecs.decode)):
        if name not in served.codecs:
            raise ProtocolError(f"{field} {name!r} is none of {', '.join(served.codecs)}", mismatch)
    if opening.max_tokens > served.limits.max_tokens:
        text = f"Open.max_tokens={opening.max_tokens} is more than {served.limits.max_tokens}"
        raise ProtocolError(text)
    check_padding(opening, served.limits, served.mode)


def codecs_of(opening: pb.Open) -> codec.CodecChoice:
    """What a device wants its rows encoded in; one of before 1.2 names one codec for all of them."""
    return codec.CodecChoice(opening.codec, opening.decode_codec or opening.codec)
