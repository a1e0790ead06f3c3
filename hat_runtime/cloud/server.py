"""The gRPC side of the cloud: handshake, streams, back-pressure. All compute is the engine's."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hat_runtime import __version__
from hat_runtime.cloud.access import Access
from hat_runtime.cloud.admission import Admission, Place
from hat_runtime.cloud.assembly import ProtocolError, StepAssembler, cost_hints, result_frames
from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.cloud.engine import Engine
from hat_runtime.cloud.handshake import Served, check_fits, codecs_of
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.peer import Peer, connected, peer_of
from hat_runtime.cloud.policy import PolicyStore
from hat_runtime.cloud.resumption import TTL_S, LostSessions
from hat_runtime.cloud.session import Evicted, Failed, Ready, Session, StepDone, Want, unknown_session
from hat_runtime.cloud.stream import Stream
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
GOING_AWAY = "this replica is going away"
OPEN_S = 10.0
"""Longest wait for the first message of a stream."""
MOST_STREAMS = 64
"""Of a connection, beyond the sessions that the cloud has."""
MOST_CALLS = 4096
"""Of all connections."""
MOST_PADDED = 8
"""Replies with padding that may be on their way: what measures a link asks for one after another."""

Context = grpc.aio.ServicerContext[Any, Any]


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
        access: Access | None = None,
        *,
        resume_ttl_s: float = TTL_S,
    ) -> None:
        """Without a policy no chunk sizes are proposed; without access everybody may come.

        A session whose stream is lost is kept for `resume_ttl_s`.
        """
        self._engine = engine
        self._access = access or Access()
        self._policy = policy or PolicyStore()
        self._load = admission.load
        self._admission = admission
        self._served = served
        self._metrics = metrics
        self._devices = devices
        self._sessions: dict[str, tuple[Session, Stream]] = {}
        self._lost = LostSessions(self._free, ttl_s=resume_ttl_s)
        self._draining = False
        self._broken: str | None = None
        self._padded = 0
        metrics.show_load(self._load.figures, lambda: engine.prompt_rows)

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
        self._admission.close(GOING_AWAY)
        notice = pb.CloudMessage(notice=pb.Notice(drain=pb.Drain(deadline_ms=round(deadline_s * 1000))))
        self._lost.clear()
        for _, stream in self._sessions.values():
            stream.deliver(notice)

    def give_up(self, reason: str) -> None:
        """The engine answers nobody any more: end every stream with the reason, and refuse new ones."""
        self._broken = reason
        self._admission.close(reason)
        self._lost.clear()
        for _, stream in self._sessions.values():
            stream.deliver(Failed(grpc.StatusCode.UNAVAILABLE, reason))

    def end_refused(self) -> None:
        """End the streams of peers that may not use this cloud any more."""
        for _, stream in list(self._sessions.values()):
            if (error := self._refusal(stream.peer)) is not None:
                self._turn_out(stream, Failed(error.code, str(error)))
        # The device of a lost session may come back with a certificate that has not expired.
        self._lost.end_where(
            lambda peer: (
                (error := self._refusal(peer)) is not None and error.code is grpc.StatusCode.PERMISSION_DENIED
            )
        )

    def _refusal(self, peer: Peer) -> ProtocolError | None:
        try:
            self._access.check(peer)
        except ProtocolError as error:
            return error
        return None

    def tuning(self) -> dict[str, Any]:
        """What sizes of chunks depend on in this cloud, as GET /v1/devices gives it (docs/operations.md)."""
        cost = self._engine.cost.fit()
        return {
            "cost": None if cost is None else vars(cost),
            "load": {**self._load.figures(), "prompt_rows": self._engine.prompt_rows},
        }

    async def describe(self, request: pb.DescribeRequest | None, context: Context) -> pb.DescribeReply:
        """See runtime.proto."""
        try:
            self._access.check(connected(context))
        except ProtocolError as error:
            await context.abort(error.code, str(error))
        limit = self._served.limits.max_frame_bytes
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a DescribeRequest")
        elif request.reply_padding_bytes > limit:
            text = f"reply_padding_bytes={request.reply_padding_bytes} is more than {limit}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        assert request is not None
        if request.reply_padding_bytes:
            await self._count_padded(context)
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

    async def _count_padded(self, context: Context) -> None:
        """Refuse too many replies with padding: a peer that does not read them makes the cloud hold them."""
        if self._padded >= MOST_PADDED:
            text = f"{self._padded} replies with padding are on their way already; try again later"
            pushback = ((RETRY_METADATA, str(round(RETRY_OVERLOADED_S * 1000))),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text, pushback)
        self._padded += 1

        def sent(_: Any) -> None:
            self._padded -= 1

        context.add_done_callback(sent)  # type: ignore[arg-type]  # the stubs want a class of their own

    @property
    def limits(self) -> pb.Limits:
        """What devices are told."""
        return self._served.limits

    async def session(
        self, requests: AsyncIterator[pb.DeviceMessage | None], context: Context
    ) -> AsyncIterator[pb.CloudMessage]:
        """See runtime.proto. Ends without status only when the device has closed its side."""
        stream = Stream(self._served.limits)
        session: Session | None = None
        reader: asyncio.Task[None] | None = None
        code = grpc.StatusCode.CANCELLED
        try:
            session = await self._open(requests, context, stream)
            reader = asyncio.create_task(self._read(requests, session, stream))
            while (event := await stream.events.get()) is not None:
                if isinstance(event, Failed):
                    raise ProtocolError(event.text, event.code, event.retry_after_s)
                for message in self._messages(event, session, stream):
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
            stream.ended()
            if stream.place is not None:
                self._part(stream.place, stream, code)

    def _part(self, place: Place, stream: Stream, code: grpc.StatusCode) -> None:
        """A session's stream has ended: keep the session where the device may come back, and free it otherwise."""
        session = place.session
        known = session is not None and session.id in self._sessions
        lost = code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK) and not (
            stream.closed or stream.failed
        )
        if known and lost and stream.resumable and not self._draining and self._broken is None:
            assert session is not None
            log.info("session %s lost its stream", session.id[:8])
            del self._sessions[session.id]
            self._admission.lose(place, lambda _: self._lost.end(session))
            self._engine.lose(session)
            self._lost.keep(place)
        else:
            self._free(place)

    def _free(self, place: Place) -> None:
        """Free what a session holds, at once and for good: nobody can resume it any more. Again it does nothing."""
        if (session := place.session) is not None:
            self._sessions.pop(session.id, None)
            self._engine.close(session)
        self._admission.leave(place)

    def _turn_out(self, stream: Stream, failure: Failed) -> None:
        """End a session and its stream."""
        if stream.place is not None:
            self._free(stream.place)
        stream.deliver(failure)

    async def _open(
        self, requests: AsyncIterator[pb.DeviceMessage | None], context: Context, stream: Stream
    ) -> Session:
        try:
            async with asyncio.timeout(OPEN_S):
                message = await anext(aiter(requests), None)
        except TimeoutError:
            text = f"no Open came in {OPEN_S:g} s"
            raise ProtocolError(text, grpc.StatusCode.DEADLINE_EXCEEDED) from None
        if message is None or message.WhichOneof("message") != "open":
            raise ProtocolError(
                "the first message of a stream must be Open", grpc.StatusCode.FAILED_PRECONDITION
            )
        opening = message.open
        request_id.set(sane_request_id(opening.request_id) or "-")
        stream.peer = peer_of(opening, context)
        self._access.check(stream.peer)
        self._check_serving()
        check_fits(opening, self._served)
        stream.codecs = codecs_of(opening)
        stream.pad_rows = opening.pad_results
        stream.resumable = opening.resumable and self._lost.ttl_s > 0
        if opening.HasField("resume"):
            return self._resume(opening.resume.session_id, stream)
        end, wait_s = partial(self._turn_out, stream), opening.deadline_ms / 1000
        stream.place = place = await self._admission.admit(stream.peer, end, wait_s)
        self._access.check(stream.peer)  # it may have waited
        self._check_serving()
        session = place.session = Session(
            id=secrets.token_hex(16),
            max_tokens=min(place.max_tokens, opening.max_tokens or self._served.limits.max_tokens),
            deliver=stream.deliver,
            tenant=stream.peer.tenant,
            device=stream.peer.device,
            last_active=time.monotonic(),
        )
        self._sessions[session.id] = (session, stream)
        self._devices.heard(stream.peer.device, row_bytes=self._row_bytes(stream))
        self._engine.open(session)
        stream.deliver(Ready(0))
        log.info("session %s opened", session.id[:8])
        return session

    def _resume(self, session_id: str, stream: Stream) -> Session:
        """Give a session to another stream of the peer that opened it; the old one may write no more.

        Raises:
            ProtocolError: there is no such session, or not of this peer.
        """
        place = self._lost.take(session_id, stream.peer)
        if place is None and (held := self._sessions.get(session_id)):
            old = held[1]
            place = old.fence() if old.resumable and old.peer == stream.peer else None
        if place is None or (session := place.session) is None:
            unknown = unknown_session(session_id)
            raise ProtocolError(unknown.text, unknown.code)
        stream.place = place
        self._admission.take_back(place, stream.peer, partial(self._turn_out, stream))
        self._sessions[session.id] = (session, stream)
        self._devices.heard(stream.peer.device, row_bytes=self._row_bytes(stream))
        self._engine.take_over(session, stream.deliver)
        log.info("session %s resumed", session.id[:8])
        return session

    def _check_serving(self) -> None:
        if self._broken is not None:
            raise ProtocolError(self._broken, grpc.StatusCode.UNAVAILABLE)
        if not self._engine.alive:
            raise ProtocolError("the engine failed; see the cloud's log", grpc.StatusCode.UNAVAILABLE)
        if self._draining:
            raise ProtocolError(GOING_AWAY, grpc.StatusCode.UNAVAILABLE, RETRY_OVERLOADED_S)

    def _row_bytes(self, stream: Stream) -> float:
        if self._served.mode:
            return 0.0
        identity = self._served.identity
        prompt = codec.codec_named(stream.codecs.prompt)
        return prompt.row_bytes(identity.hidden_size, codec.DTYPES[identity.dtype])

    def _messages(self, event: Any, session: Session, stream: Stream) -> Any:
        if isinstance(event, StepDone):
            work = event.work
            if work.decodes and not event.stale and stream.alone:
                self._admission.saw_step(work.n + len(work.alternatives), work.waited_s + work.compute_s)
            if work.want is Want.ALL and not event.stale:
                company = max(0, work.batch_tokens - work.n - len(work.alternatives))
                self._load.observe(work.waited_s if stream.alone else None, company)
            chunk = 0 if self._served.mode else self._policy.current.chunk_for(stream.peer.device)
            verdict = None if event.verdict is None else verdict_message(event.verdict)
            of_prompt = work.want is Want.LAST and work.tokens is None
            return result_frames(
                event,
                verdict,
                cost_hints(self._engine.cost.fit(), self._engine.prompt_rows) if of_prompt else None,
                chunk,
                stream.pad_rows,
            )
        if isinstance(event, Decoded):
            return (decoded_message(event),)
        if isinstance(event, Evicted):
            return (pb.CloudMessage(notice=pb.Notice(evicted=pb.Evicted(committed=event.committed))),)
        if isinstance(event, Ready):
            return (self._opened(session, event.committed, stream),)
        return (event,)

    def _opened(self, session: Session, committed: int, stream: Stream) -> pb.CloudMessage:
        limits = pb.Limits()
        limits.CopyFrom(self._served.limits)
        if stream.place is not None:
            limits.max_tokens = min(limits.max_tokens, stream.place.max_tokens)
        return pb.CloudMessage(
            opened=pb.Opened(
                session_id=session.id,
                committed=committed,
                limits=limits,
                cost=cost_hints(self._engine.cost.fit(), self._engine.prompt_rows),
                protocol_minor=PROTOCOL[1],
                resume_ms=round(self._lost.ttl_s * 1000) if stream.resumable else 0,
            )
        )

    async def _read(
        self, requests: AsyncIterator[pb.DeviceMessage | None], session: Session, stream: Stream
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
                        if stream.fenced:
                            return
                        self._engine.submit(session, work)
                elif kind == "telemetry":
                    assert message is not None
                    self._observe(message.telemetry)
                    self._devices.heard(stream.peer.device, message.telemetry)
                elif kind == "close":
                    stream.close()
                    return
                elif kind == "open":
                    raise ProtocolError("a second Open on one stream", grpc.StatusCode.FAILED_PRECONDITION)
                elif message is None:
                    raise ProtocolError("a message that is no DeviceMessage")
                # Anything else is from a later minor version and may be ignored.
            stream.half_close()
        except ProtocolError as error:
            stream.deliver(Failed(error.code, str(error), error.retry_after_s))

    def _assembler(self, stream: Stream) -> StepAssembler | TokenAssembler:
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


def make_server(service: RuntimeService) -> grpc.aio.Server:
    """A gRPC server with the runtime service and the limits that both sides agree on."""
    server = grpc.aio.server(
        maximum_concurrent_rpcs=MOST_CALLS,
        options=(
            ("grpc.max_concurrent_streams", service.limits.max_sessions + MOST_STREAMS),
            ("grpc.max_receive_message_length", frames.MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", frames.MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),  # a busy port must be an error
            ("grpc.keepalive_permit_without_calls", 1),
            # A device that went without a word: its session must be lost in time to be kept, and then freed.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),  # else gRPC waits a minute, whatever is above
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 0),
        ),
    )
    server.add_generic_rpc_handlers((service.handler(),))
    return server
