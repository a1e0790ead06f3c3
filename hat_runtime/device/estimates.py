"""What the device learns of its link and its drafts from the Steps it sends anyway."""

from __future__ import annotations

from dataclasses import dataclass

_PAST = 0.8
"""Weight of the past in the moving averages (HAT, arXiv 2503.18989, section IV)."""

_KEEP_DRAFT = 0.99
"""Weight that a draft loses with each later one: the last hundred or so count."""

_SMALL_BYTES = 16 * 1024
_LARGE_BYTES = 64 * 1024


@dataclass
class LinkEstimate:
    """Moving averages of round-trip time and uplink rate; 0 until something was seen.

    Only durations of this machine's clock are subtracted from each other, and the cloud's own durations from them.
    """

    rtt_s: float = 0.0
    uplink_bytes_per_s: float = 0.0

    def add(self, sent_bytes: int, elapsed_s: float, cloud_s: float) -> None:
        """One answered Step that met no other Step of its session on the way.

        Args:
            sent_bytes: payload that went up.
            elapsed_s: from handing the Step to the link until its Result was complete.
            cloud_s: queue and compute time that the cloud reported.
        """
        travel_s = elapsed_s - cloud_s
        if travel_s <= 0:
            return
        if sent_bytes <= _SMALL_BYTES:
            self.rtt_s = _mean(self.rtt_s, travel_s)
        elif sent_bytes >= _LARGE_BYTES and travel_s > self.rtt_s:
            self.uplink_bytes_per_s = _mean(self.uplink_bytes_per_s, sent_bytes / (travel_s - self.rtt_s))


@dataclass
class Acceptance:
    """How many of the latest drafts the target agreed with, over all answers of a device."""

    _accepted: float = 0.0
    _drafted: float = 0.0

    @property
    def rate(self) -> float:
        """Share of accepted drafts, 0 to 1; 0 until there were any."""
        return self._accepted / self._drafted if self._drafted else 0.0

    def add(self, accepted: int, drafted: int) -> None:
        """A round's drafts: `drafted` of them, of which the first `accepted` were right."""
        past = _KEEP_DRAFT**drafted
        self._accepted = past * self._accepted + accepted
        self._drafted = past * self._drafted + drafted


def _mean(past: float, new: float) -> float:
    return new if past == 0.0 else _PAST * past + (1 - _PAST) * new
