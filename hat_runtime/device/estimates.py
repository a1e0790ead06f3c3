"""What the device learns of its link and its drafts from the Steps it sends anyway."""

from __future__ import annotations

from dataclasses import dataclass, field

from hat_runtime.control.drafting import PAST, average
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

_KEEP_DRAFT = 0.99
"""Weight that a draft loses with each later one: the last hundred or so count."""

_SMALL_BYTES = 16 * 1024
"""A chunk of more bytes than these tells the rate."""

JITTER = 0.25
"""Part of the round-trip time that it may vary by."""
TRUSTED = 0.5
FAR = 2.0
"""A rate that is so many times larger or smaller than the usual one is another link's, if it comes twice."""


@dataclass
class LinkEstimate:
    """Moving averages of round-trip time and uplink rate; 0 until something was seen.

    Only times of this machine's clock are subtracted from each other, and the cloud's own durations from them.
    """

    rtt_s: float = 0.0
    uplink_bytes_per_s: float = 0.0
    _delivered_s: float = 0.0
    """When the link had delivered the Step before, half a round trip earlier."""
    _far: int = 0
    """Whether the last rate was far above (1) or below (-1) the usual one."""

    def add(
        self,
        sent_bytes: int,
        submitted_s: float,
        received_s: float,
        cloud_s: float,
        *,
        alone: bool,
        chunk: bool = True,
    ) -> None:
        """One answered Step.

        Chunks of a prompt tell the rate: what comes down for them is small, and many bytes go up. All others tell the
        round-trip time. What the link took for a chunk is counted from when it was handed over or, if later, from when
        the link was done with the one before it: so chunks that follow one another tell the rate as well.

        Args:
            sent_bytes: payload that went up.
            submitted_s: monotonic seconds when the Step was handed to the link.
            received_s: when its Result was complete.
            cloud_s: queue and compute time that the cloud reported.
            alone: it met no other Step of its session on the way.
            chunk: it is one of a prompt.
        """
        travel_s = received_s - submitted_s - cloud_s
        if travel_s <= 0:
            return
        if not chunk or sent_bytes <= _SMALL_BYTES:
            both_ways_s = 2 * sent_bytes / self.uplink_bytes_per_s if self.uplink_bytes_per_s else 0.0
            if alone and (sent_bytes <= _SMALL_BYTES or 0 < both_ways_s < travel_s):
                self.rtt_s = average(
                    self.rtt_s, travel_s - (both_ways_s if sent_bytes > _SMALL_BYTES else 0.0)
                )
            return
        delivered_s = received_s - cloud_s - self.rtt_s
        took_s = delivered_s - max(submitted_s, self._delivered_s)
        self._delivered_s = max(self._delivered_s, delivered_s)
        if took_s > 0:
            self._saw_rate(sent_bytes / took_s, took_s / (took_s + JITTER * self.rtt_s))

    def _saw_rate(self, rate: float, trust: float) -> None:
        """One chunk's rate; `trust`, 0 to 1: less where the chunk took no longer than round trips differ by."""
        far = 0
        if trust >= TRUSTED and self.uplink_bytes_per_s:
            ratio = rate / self.uplink_bytes_per_s
            far = (ratio > FAR) - (ratio < 1 / FAR)
        if far and far == self._far:  # twice: another link, whose past tells nothing
            self.uplink_bytes_per_s, self._far = rate, 0
            return
        self._far = far
        self.uplink_bytes_per_s = average(self.uplink_bytes_per_s, rate, 1 - (1 - PAST) * trust)


@dataclass(eq=False)
class CloudView:
    """What Results have told of link and cloud: all that the choice of chunks goes by."""

    estimate: LinkEstimate = field(default_factory=LinkEstimate)
    cloud_cost: pb.CostHints = field(default_factory=pb.CostHints)
    """What the cloud said last of the cost of its passes."""
    suggested_chunk: int = 0
    """Chunk size that the cloud proposed last, in tokens; 0: none."""
    cloud_wait_s: float = 0.0
    """From the arrival of a Step in the cloud to its pass, where no other of its session is there; average."""
    company: float = 0.0
    """Rows of other sessions in a pass, average."""

    def learn(
        self,
        sent_bytes: int,
        submitted_s: float,
        received_s: float,
        queue_s: float,
        compute_s: float,
        company: int,
        *,
        alone: bool,
        chunk: bool,
    ) -> None:
        """One answered Step; `company` are others' rows in its pass, the rest is as in `LinkEstimate.add`."""
        if alone:
            self.cloud_wait_s = PAST * self.cloud_wait_s + (1 - PAST) * queue_s
            self.company = PAST * self.company + (1 - PAST) * company
        self.estimate.add(sent_bytes, submitted_s, received_s, queue_s + compute_s, alone=alone, chunk=chunk)


@dataclass
class Acceptance:
    """How many of the latest drafts the target agreed with, over all answers of a device."""

    _accepted: float = 0.0
    _drafted: float = 0.0

    @property
    def rate(self) -> float:
        """Share of accepted drafts, 0 to 1; 0 until there were any."""
        return self._accepted / self._drafted if self._drafted else 0.0

    @property
    def known(self) -> bool:
        """Whether there were any."""
        return self._drafted > 0

    def add(self, accepted: int, drafted: int) -> None:
        """A round's drafts: `drafted` of them, of which the first `accepted` were right."""
        past = _KEEP_DRAFT**drafted
        self._accepted = past * self._accepted + accepted
        self._drafted = past * self._drafted + drafted
