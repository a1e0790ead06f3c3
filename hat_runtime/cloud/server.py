"""The gRPC side of the cloud: handshake, streams, back-pressure. All compute is the engine's."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hat_runtime import __version__
from hat_runtime.cloud import tokens
from hat_runtime.cloud.admission import Admission, Place
from hat_runtime.cloud.assembly import ProtocolError, StepAssembler, cost_hints, result_frames
from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.cloud.engine import Engine
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.peer import Peer, peer_of
from hat_runtime.cloud.policy import PolicyStore
from hat_runtime.cloud.session import Event, Evicted, Failed, Session, StepDone, Want
from hat_runtime.cloud.token_assembly import TokenAssembler, decoded_message, verdict_message
from hat_runtime.cloud.tokens import Decoded
from hat_runtime.log import request_id, sane_request_id
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire import codec, frames

log = logging.getLogger(__name__)

PROTOCOL = (1, 4)
"""Major and minor version of the session protocol."""

SERVICE = pb.DESCRIPTOR.services_by_name["Runtime"].full_name
RETRY_METADATA = "grpc-retry-pushback-ms"  # gRPC's own name (gRFC A6)
RETRY_OVERLOADED_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Served:
    """What every handshake is compared with."""

    identity: pb.ModelIdentity
    limits: pb.Limits
    idle_after_s: float
    mode: str = ""
    """"" for hidden states, MODE of tokens.py for token ids."""
    vocab_size: int = 0
    tokenizer_id: str = ""

    @property
    def codecs(self) -> tuple[str, ...]:
        """What payloads may be encoded as, the preferred one first."""
        return (tokens.CODEC,) if self.mode else codec.CODECS


class _Stream:
    """One session's stream on the event loop: answers waiting to be written, Steps waiting to be answered."""

    def __init__(self, limits: pb.Limits) -> None:
        self.events: asyncio.Queue[Event | pb.CloudMessage | None] = asyncio.Queue()
        self.peer = Peer()
        """Who is at the other end."""
        self.place: Place | None = None
        """Its session's place in the cloud."""
        self.codecs = codec.RAW_ONLY
        """How its Steps are encoded."""
        self._limits = limits
        self._steps = 0
        self._tokens = 0
        self._room = asyncio.Event()
        self._half_closed = False

    async def admit(self, tokens: int) -> None:
        """Wait until one more Step of `tokens` may be queued. Meanwhile nothing is read, so gRPC slows the device."""
        while self._steps and (
            self._steps >= self._limits.max_inflight_steps
            or self._tokens + tokens > 2 * self._limits.max_step_tokens
        ):
            self._room.clear()
            await self._room.wait()
        self._steps += 1
        self._tokens += tokens

    @property
    def alone(self) -> bool:
        """Whether only one Step is unanswered."""
        return self._steps == 1

    def answered(self, done: StepDone) -> None:
        """A Step's answer was written."""
        self._steps -= 1
        self._tokens -= done.work.n
        self._room.set()
        self._end_if_finished()

    def half_close(self) -> None:
        """The device sends no more; the stream ends with its last answer."""
        self._half_closed = True
        self._end_if_finished()

    def _end_if_finished(self) -> None:
        if self._half_closed and not self._steps:
            self.events.put_nowait(None)


class RuntimeService:
    """hat.v1.Runtime."""

    def __init__(
        self,
        engine: Engine,
        served: Served,
        metrics: CloudMetrics,
        devices: DeviceTable,
        admission: Admission,
        policy: PolicyStore | None = None,
    ) -> None:
        """Without a policy no chunk sizes are proposed."""
        self._engine = engine
        self._policy = policy or PolicyStore()
        self._load = admission.load
        self._admission = admission
        self._served = served
        self._metrics = metrics
        self._devices = devices
        self._sessions: dict[str, tuple[Session, _Stream]] = {}
        self._draining = False

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for `grpc.aio.Server.add_generic_rpc_handlers`; it counts bytes and survives garbage."""
        describe = grpc.unary_unary_rpc_method_handler(
            self.describe,
            request_deserializer=self._parser(pb.DescribeRequest),
            response_serializer=pb.DescribeReply.SerializeToString,
        )
        session = grpc.stream_stream_rpc_method_handler(
            self.session,
            request_deserializer=self._parser(pb.DeviceMessage),
            response_serializer=self._serialize,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Describe": describe, "Session": session})

    def drain(self, deadline_s: float) -> None:
        """Refuse new sessions and tell the open ones to leave within `deadline_s` seconds."""
        self._draining = True
        self._admission.drain()
        notice = pb.CloudMessage(notice=pb.Notice(drain=pb.Drain(deadline_ms=round(deadline_s * 1000))))
        for _, stream in self._sessions.values():
            stream.events.put_nowait(notice)

    def tuning(self) -> dict[str, Any]:
        """What sizes of chunks depend on in this cloud, as GET /v1/devices gives it (docs/operations.md)."""
        cost = self._engine.cost.fit()
        return {
            "cost": None if cost is None else vars(cost),
            "load": {**self._load.figures(), "prompt_rows": self._engine.prompt_rows},
        }

    async def describe(self, request: pb.DescribeRequest | None, context: Context) -> pb.DescribeReply:
        """See runtime.proto."""
        limit = self._served.limits.max_frame_bytes
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a DescribeRequest")
        elif request.reply_padding_bytes > limit:
            text = f"reply_padding_bytes={request.reply_padding_bytes} is more than {limit}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        assert request is not None
        cache = self._engine.runner.cache
        return pb.DescribeReply(
            protocol_major=PROTOCOL[0],
            protocol_minor=PROTOCOL[1],
            software=__version__,
            model=self._served.identity,
            codecs=self._served.codecs,
            limits=self._served.limits,
            pages=pb.PageBudget(page_tokens=cache.page_tokens, total=cache.num_pages, free=cache.free_pages),
            padding=bytes(request.reply_padding_bytes),
            mode=self._served.mode,
            vocab_size=self._served.vocab_size,
            tokenizer_id=self._served.tokenizer_id,
        )

    async def session(
        self, requests: AsyncIterator[pb.DeviceMessage | None], context: Context
    ) -> AsyncIterator[pb.CloudMessage]:
        """See runtime.proto. Ends without status only when the device has closed its side."""
        stream = _Stream(self._served.limits)
        session: Session | None = None
        reader: asyncio.Task[None] | None = None
        code = grpc.StatusCode.CANCELLED
        try:
            session = await self._open(requests, context, stream)
            reader = asyncio.create_task(self._read(requests, session, stream))
            yield self._opened(session, stream)
            while (event := await stream.events.get()) is not None:
                if isinstance(event, Failed):
                    raise ProtocolError(event.text, event.code, event.retry_after_s)
                for message in self._messages(event, stream):
                    yield message
                if isinstance(event, StepDone):
                    stream.answered(event)
            code = grpc.StatusCode.OK
        except ProtocolError as error:
            code = error.code
            log.info("stream ends with %s: %s", code.name, error)
            trailing: tuple[tuple[str, str], ...] = ()
            if error.retry_after_s is not None:
                trailing = ((RETRY_METADATA, str(round(error.retry_after_s * 1000))),)
            await context.abort(code, str(error), trailing)
        except Exception:
            code = grpc.StatusCode.UNKNOWN
            log.exception("a stream failed")
            raise
        finally:
            self._metrics.ended.labels(code.name).inc()
            if reader is not None:
                reader.cancel()
            if stream.place is not None:
                self._admission.leave(stream.place)
            if session is not None:
                self._sessions.pop(session.id, None)
                self._engine.close(session)

    async def _open(
        self, requests: AsyncIterator[pb.DeviceMessage | None], context: Context, stream: _Stream
    ) -> Session:
        message = await anext(aiter(requests), None)
        if message is None or message.WhichOneof("message") != "open":
            raise ProtocolError(
                "the first message of a stream must be Open", grpc.StatusCode.FAILED_PRECONDITION
            )
        opening = message.open
        request_id.set(sane_request_id(opening.request_id) or "-")
        self._check_handshake(opening)
        stream.peer = peer_of(opening, context)
        end, wait_s = stream.events.put_nowait, opening.deadline_ms / 1000
        stream.place = place = await self._admission.admit(stream.peer, end, wait_s)
        session = place.session = Session(
            id=secrets.token_hex(16),
            max_tokens=min(place.max_tokens, opening.max_tokens or self._served.limits.max_tokens),
            deliver=stream.events.put_nowait,
            tenant=stream.peer.tenant,
            device=stream.peer.device,
            last_active=time.monotonic(),
        )
        self._sessions[session.id] = (session, stream)
        stream.codecs = _codecs(opening)
        self._devices.heard(stream.peer.device, row_bytes=self._row_bytes(stream))
        self._engine.open(session)
        log.info("session %s opened", session.id[:8])
        return session

    def _check_handshake(self, opening: pb.Open) -> None:
        identity, mismatch = self._served.identity, grpc.StatusCode.FAILED_PRECONDITION
        if not self._engine.alive:
            raise ProtocolError("the engine failed; see the cloud's log", grpc.StatusCode.UNAVAILABLE)
        if self._draining:
            raise ProtocolError("this replica is going away", grpc.StatusCode.UNAVAILABLE, RETRY_OVERLOADED_S)
        if opening.HasField("resume"):
            text = f"session {opening.resume.session_id!r} is unknown: it ended with its stream"
            raise ProtocolError(text, grpc.StatusCode.NOT_FOUND)
        for field, device, cloud in (
            ("mode", opening.mode or "hat", self._served.mode or "hat"),
            ("model_revision", opening.model_revision, identity.model_revision),
            ("layers", f"{opening.lo}:{opening.hi}", f"{identity.lo}:{identity.hi}"),
            ("dtype", opening.dtype, identity.dtype),
        ):
            if device != cloud:
                raise ProtocolError(
                    f"{field} {device!r} of the device is not the cloud's {cloud!r}", mismatch
                )
        codecs = _codecs(opening)
        for field, name in (("codec", codecs.prompt), ("decode_codec", codecs.decode)):
            if name not in self._served.codecs:
                raise ProtocolError(f"{field} {name!r} is none of {', '.join(self._served.codecs)}", mismatch)
        if opening.max_tokens > self._served.limits.max_tokens:
            text = f"Open.max_tokens={opening.max_tokens} is more than {self._served.limits.max_tokens}"
            raise ProtocolError(text)

    def _row_bytes(self, stream: _Stream) -> float:
        if self._served.mode:
            return 0.0
        identity = self._served.identity
        prompt = codec.codec_named(stream.codecs.prompt)
        return prompt.row_bytes(identity.hidden_size, codec.DTYPES[identity.dtype])

    def _messages(self, event: Any, stream: _Stream) -> Any:
        if isinstance(event, StepDone):
            work = event.work
            if work.decodes and not event.stale and stream.alone:
                self._load.saw_step(work.n + len(work.alternatives), work.waited_s + work.compute_s)
            if work.want is Want.ALL and not event.stale:
                company = max(0, work.batch_tokens - work.n - len(work.alternatives))
                self._load.observe(work.waited_s if stream.alone else None, company)
            chunk = 0 if self._served.mode else self._policy.policy.chunk_for(stream.peer.device)
            verdict = None if event.verdict is None else verdict_message(event.verdict)
            of_prompt = work.want is Want.LAST and work.tokens is None
            return result_frames(
                event,
                verdict,
                cost_hints(self._engine.cost.fit(), self._engine.prompt_rows) if of_prompt else None,
                chunk,
            )
        if isinstance(event, Decoded):
            return (decoded_message(event),)
        if isinstance(event, Evicted):
            return (pb.CloudMessage(notice=pb.Notice(evicted=pb.Evicted(committed=event.committed))),)
        return (event,)

    def _opened(self, session: Session, stream: _Stream) -> pb.CloudMessage:
        limits = pb.Limits()
        limits.CopyFrom(self._served.limits)
        if stream.place is not None:
            limits.max_tokens = min(limits.max_tokens, stream.place.max_tokens)
        return pb.CloudMessage(
            opened=pb.Opened(
                session_id=session.id,
                committed=0,
                limits=limits,
                cost=cost_hints(self._engine.cost.fit(), self._engine.prompt_rows),
                protocol_minor=PROTOCOL[1],
            )
        )

    async def _read(
        self, requests: AsyncIterator[pb.DeviceMessage | None], session: Session, stream: _Stream
    ) -> None:
        """Feed the engine until the device closes its side or breaks the protocol."""
        assembler = self._assembler(stream)
        try:
            async for message in requests:
                kind = None if message is None else message.WhichOneof("message")
                if kind == "step":
                    assert message is not None
                    if (name := sane_request_id(message.step.request_id)) is not None:
                        request_id.set(name)
                        log.info("session %s serves this request from here", session.id[:8])
                    self._devices.heard(stream.peer.device)
                    if (work := assembler.feed(message.step)) is not None:
                        await stream.admit(work.n)
                        self._engine.submit(session, work)
                elif kind == "telemetry":
                    assert message is not None
                    self._observe(message.telemetry)
                    self._devices.heard(stream.peer.device, message.telemetry)
                elif kind == "open":
                    raise ProtocolError("a second Open on one stream", grpc.StatusCode.FAILED_PRECONDITION)
                elif message is None:
                    raise ProtocolError("a message that is no DeviceMessage")
                # Anything else is from a later minor version and may be ignored.
            stream.half_close()
        except ProtocolError as error:
            stream.events.put_nowait(Failed(error.code, str(error), error.retry_after_s))

    def _assembler(self, stream: _Stream) -> StepAssembler | TokenAssembler:
        served = self._served
        if served.mode:
            return TokenAssembler(served.vocab_size, served.limits)
        dtype = codec.DTYPES[served.identity.dtype]
        return StepAssembler(served.identity.hidden_size, dtype, served.limits, stream.codecs)

    def _observe(self, telemetry: pb.Telemetry) -> None:
        for metric, value in (
            (self._metrics.device_uplink, telemetry.uplink_bytes_per_s),
            (self._metrics.device_rtt, telemetry.rtt_s),
            (self._metrics.device_ttft, telemetry.ttft_s),
        ):
            if 0 < value < float("inf"):
                metric.observe(value)

    def _parser(self, kind: Any) -> Any:
        """A deserializer that counts, and gives None for garbage: the handler then ends the stream with a status."""

        def parse(data: bytes) -> Any:
            self._metrics.uplink_bytes.inc(len(data))
            try:
                return kind.FromString(data)
            except DecodeError:
                return None

        return parse

    def _serialize(self, message: pb.CloudMessage) -> bytes:
        data = message.SerializeToString()
        self._metrics.downlink_bytes.inc(len(data))
        return data


def _codecs(opening: pb.Open) -> codec.CodecChoice:
    """What a device wants its rows encoded in; one of before 1.2 names one codec for all of them."""
    return codec.CodecChoice(opening.codec, opening.decode_codec or opening.codec)


def make_server(service: RuntimeService) -> grpc.aio.Server:
    """A gRPC server with the runtime service and the limits that both sides agree on."""
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", frames.MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", frames.MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),  # a busy port must be an error
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 0),
        )
    )
    server.add_generic_rpc_handlers((service.handler(),))
    return server
