"""The device's connection to the cloud: one gRPC channel, Describe, and sessions on it."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from dataclasses import dataclass

import grpc
from prometheus_client import CollectorRegistry

from hat_runtime.device.channels import Channels
from hat_runtime.device.estimates import Acceptance, CloudView
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.device.refusals import explain
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import Binding
from hat_runtime.errors import CloudOverloaded, HandshakeError, HatError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.security.folder import TlsFolder
from hat_runtime.wire.codec import RAW, codec_named, dtype_name
from hat_runtime.wire.frames import MAX_FRAME_BYTES

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 4
TELEMETRY_EVERY_S = 5.0
KEEPALIVE_S = 20.0
PATIENCE = 0.8
"""Of the time in which a session must be open, what it may wait in the cloud's line: the rest is the link's."""


@dataclass(frozen=True)
class LinkRate:
    """Goodput of the link as measured with padded Describe calls, in bytes per second."""

    up: float
    down: float


class CloudLink(CloudView):
    """A channel to one cloud. For the event loop that made it."""

    def __init__(
        self,
        address: str,
        metrics: DeviceMetrics | None = None,
        *,
        timeout_s: float = 10.0,
        tls: TlsFolder | None = None,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        """Connect lazily: the first call does it.

        Args:
            address: "HOST:PORT" of the cloud's gRPC port.
            metrics: where bytes and round-trip times are counted.
            timeout_s: longest wait for Describe and for a session to open.
            tls: certificates; None: without TLS.
            keepalive_s: from the last sign of life to a ping; half as long without an answer, and the connection is
                given up.
        """
        super().__init__()
        self.address = address
        self.metrics = metrics or DeviceMetrics(CollectorRegistry())
        self.timeout_s = timeout_s
        self.acceptance = Acceptance()
        self.retry_at_s = 0.0
        """time.monotonic() before which the cloud asked not to be bothered (Notice RETRY)."""
        self.sessions: set[CloudSession] = set()
        self.parting: set[CloudSession] = set()
        """Sessions that the cloud was told to end and that wait for its word."""
        self.limits = pb.Limits()
        """The cloud's limits as of the last Describe."""
        self.cloud_minor = 0
        """The cloud's minor protocol version as of the last Describe."""
        self._telemetry_at_s = 0.0
        self.channels = Channels(address, tls, keepalive_s)
        self._answered_s: float | None = None
        """time.monotonic() of the last Result."""

    @property
    def contact_age_s(self) -> float:
        """Seconds since the cloud answered a Step last; NaN before the first."""
        return math.nan if self._answered_s is None else time.monotonic() - self._answered_s

    async def describe(self, *, padding: int = 0, reply_padding: int = 0) -> pb.DescribeReply:
        """What the cloud serves.

        Args:
            padding: bytes of ballast to send up.
            reply_padding: bytes of ballast to get back.

        Raises:
            CloudUnavailable: not reachable, or no answer in time.
            HandshakeError: it does not speak this protocol.
        """
        request = pb.DescribeRequest(padding=bytes(padding), reply_padding_bytes=reply_padding)
        try:
            with self.channels.leased() as lease:
                reply: pb.DescribeReply = await lease.stub.Describe(request, timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self.explain(error) from error
        if reply.protocol_major != PROTOCOL_MAJOR:
            raise HandshakeError(
                f"the cloud at {self.address} speaks protocol {reply.protocol_major}.{reply.protocol_minor}, this "
                f"device {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}: install the same major version of HAT on both sides"
            )
        self.limits, self.cloud_minor = reply.limits, reply.protocol_minor
        return reply

    def open_session(
        self,
        binding: Binding,
        *,
        request_id: str = "",
        tenant: str = "",
        device_name: str = "",
        resume: CloudSession | None = None,
    ) -> CloudSession:
        """Open a generation session, without waiting for the cloud's consent: see `CloudSession.opened`.

        `resume` is a session whose stream was lost: the new one takes its place, and `opened` has to be waited for.

        What goes wrong later ends the session: CloudUnavailable (not reachable, or full, and then `retry_after_s`
        says when to try again) or HandshakeError (another model, split, dtype or codec).

        Raises:
            CloudOverloaded: a Notice asked for a pause that is not over.
        """
        wait_s = self.retry_at_s - time.monotonic()
        if wait_s > 0:
            raise CloudOverloaded(f"the cloud at {self.address} asked to be left alone for now", wait_s)
        metadata = (("x-request-id", request_id),) if request_id else None
        lease = self.channels.lease()
        session = CloudSession(self, lease.stub.Session(metadata=metadata), binding)
        session.when_over(lease.release)
        self.sessions.add(session)
        message = pb.Open(
            model_revision=binding.model_revision,
            lo=binding.layers.lo,
            hi=binding.layers.hi,
            dtype=dtype_name(binding.dtype),
            codec=binding.codec,
            decode_codec=binding.decode_codec,
            tenant=tenant,
            request_id=request_id,
            protocol_minor=PROTOCOL_MINOR,
            device=device_name,
            mode=binding.mode,
            resumable=True,
            pad_results=0 if binding.padding is None else binding.padding.round_rows,
            deadline_ms=round(PATIENCE * self.timeout_s * 1000),
        )
        if resume is not None:
            message.resume.session_id = resume.session_id
        session.open(message, self.limits, self.timeout_s, resume)
        return session

    def row_s(self, binding: Binding) -> float:
        """Seconds that one more row of a round takes on its way up and down; 0 while the rate is not known.

        The way down is taken to be as fast as the way up, for it is not measured.
        """
        rate = self.estimate.uplink_bytes_per_s
        if binding.padding is not None:
            return 0.0  # a round has one size, however many rows are in it
        both = (binding.encoding(True), codec_named(RAW))  # Results are raw
        size = sum(codec.row_bytes(binding.hidden_size, binding.dtype) for codec in both)
        return size / rate if rate else 0.0

    async def measure_rtt(self, calls: int = 7) -> float:
        """Median time of an empty Describe on a warm connection, in seconds."""
        await self.describe()
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            await self.describe()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    async def measure_rate(self, max_bytes: int = MAX_FRAME_BYTES, enough_s: float = 0.3) -> LinkRate:
        """Goodput up and down: growing padding until a transfer takes `enough_s` or is `max_bytes` long."""
        rtt = await self.measure_rtt()

        async def rate(up: bool) -> float:
            size = min(max_bytes, 16 * 1024)
            while True:
                began = time.perf_counter()
                await self.describe(padding=size if up else 0, reply_padding=0 if up else size)
                took = max(time.perf_counter() - began - rtt, 1e-6)
                if took >= enough_s or size >= max_bytes:
                    return size / took
                size = min(max_bytes, size * 4)

        return LinkRate(up=await rate(True), down=await rate(False))

    def saw_result(
        self,
        sent_bytes: int,
        submitted_s: float,
        queue_s: float,
        compute_s: float,
        company: int,
        *,
        alone: bool,
        chunk: bool,
    ) -> None:
        """Note the timing of a Step that was answered just now (called by the sessions)."""
        self.metrics.cloud_queue.observe(queue_s)
        self.metrics.cloud_step.observe(compute_s)
        received_s = self._answered_s = time.monotonic()
        self.learn(sent_bytes, submitted_s, received_s, queue_s, compute_s, company, alone=alone, chunk=chunk)
        self.metrics.link_rtt.set(self.estimate.rtt_s)
        self.metrics.link_uplink.set(self.estimate.uplink_bytes_per_s)

    def saw_drafts(self, accepted: int, drafted: int) -> None:
        """Note how many of a round's drafts the target agreed with (called by the answers)."""
        self.metrics.accepted_tokens.inc(accepted)
        self.metrics.draft_tokens.inc(drafted)
        self.acceptance.add(accepted, drafted)

    def saw_alternatives(self, checked: int, accepted: bool) -> None:
        """Note a round's alternatives, and whether one of them was right (called by the answers)."""
        self.metrics.alternatives.inc(checked)
        self.metrics.alternatives_accepted.inc(accepted)

    def send_telemetry(
        self, session: CloudSession, *, shallow_s_per_token: float, chunk: int, ttft_s: float
    ) -> None:
        """Tell the cloud how link and device do, at most once in 5 s for the whole link."""
        now = time.monotonic()
        if now - self._telemetry_at_s < TELEMETRY_EVERY_S or not session.alive:
            return
        self._telemetry_at_s = now
        session.send_telemetry(
            pb.Telemetry(
                uplink_bytes_per_s=self.estimate.uplink_bytes_per_s,
                rtt_s=self.estimate.rtt_s,
                shallow_s_per_token=shallow_s_per_token,
                acceptance=self.acceptance.rate,
                chunk_tokens=chunk,
                ttft_s=ttft_s,
            )
        )

    def forget(self, session: CloudSession) -> None:
        """A session has ended (called by the session)."""
        self.sessions.discard(session)

    def explain(self, error: grpc.aio.AioRpcError) -> HatError:
        """A failed call to this cloud in words."""
        return explain(error, self.address, self.channels.material)

    def part(self, session: CloudSession) -> None:
        """The cloud is being told that a session is over (called by the session)."""
        self.parting.add(session)

    def parted(self, session: CloudSession) -> None:
        """A session's stream is over (called by the session)."""
        self.parting.discard(session)

    async def close(self) -> None:
        """End all sessions and the connection."""
        for session in list(self.sessions):
            session.close()
        await asyncio.gather(*(session.parted() for session in self.parting))
        await self.channels.close()
