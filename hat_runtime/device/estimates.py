"""What the device learns of its link from the Steps it sends anyway."""

from __future__ import annotations

from dataclasses import dataclass

_PAST = 0.8
"""Weight of the past in the moving averages (HAT, arXiv 2503.18989, section IV)."""

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


def _mean(past: float, new: float) -> float:
    return new if past == 0.0 else _PAST * past + (1 - _PAST) * new
