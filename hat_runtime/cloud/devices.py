"""What the cloud knows of each device: when it was heard last, and what it said of its link.

Served as JSON, because a Prometheus label for each device would make the number of series grow without bound.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hat_runtime.log import sane_device_name
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

MAX_DEVICES = 2048
STALE_S = 600.0


@dataclass
class _Device:
    heard: float
    """Monotonic seconds of the last message."""
    row_bytes: float = 0.0
    """One row of a prompt on the wire, in the codec of its latest session; 0 where no rows travel."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last Telemetry; what was not measured is absent."""


class DeviceTable:
    """The devices that were heard in the last `stale_s` seconds, at most `max_devices` of them.

    Devices name themselves (Open.device) and nothing proves the name: figures are for people and for tuning, never for
    decisions about rights. For the event loop's thread.
    """

    def __init__(
        self,
        *,
        max_devices: int = MAX_DEVICES,
        stale_s: float = STALE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_devices = max_devices
        self._stale_s = stale_s
        self._clock = clock
        # Longest silent first.
        self._devices: OrderedDict[str, _Device] = OrderedDict()

    def heard(self, name: str, telemetry: pb.Telemetry | None = None, row_bytes: float | None = None) -> None:
        """Note a message of a device, and with its Open what a row takes; one without a usable name is not listed."""
        if sane_device_name(name) is None:
            return
        now = self._clock()
        device = self._devices.setdefault(name, _Device(now))
        device.heard = now
        if row_bytes is not None:
            device.row_bytes = row_bytes
        if telemetry is not None:
            device.figures = _figures(telemetry)
        self._devices.move_to_end(name)
        self._forget(now)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each device, by name, as GET /v1/devices gives them (docs/operations.md)."""
        now = self._clock()
        self._forget(now)
        return [
            {
                "name": name,
                "seconds_since_contact": round(now - device.heard, 3),
                **({"row_bytes": device.row_bytes} if device.row_bytes else {}),
                **device.figures,
            }
            for name, device in sorted(self._devices.items())
        ]

    def _forget(self, now: float) -> None:
        while self._devices:
            oldest = next(iter(self._devices.values()))
            if len(self._devices) <= self._max_devices and now - oldest.heard <= self._stale_s:
                return
            self._devices.popitem(last=False)


def _figures(telemetry: pb.Telemetry) -> dict[str, float]:
    """What was measured: 0 says that it was not, and anything else that is no such figure is not passed on."""
    seen = {
        "chunk_tokens": telemetry.chunk_tokens,
        "uplink_bytes_per_s": telemetry.uplink_bytes_per_s,
        "rtt_s": telemetry.rtt_s,
        "shallow_s_per_token": telemetry.shallow_s_per_token,
        "ttft_s": telemetry.ttft_s,
        "acceptance": telemetry.acceptance if telemetry.acceptance <= 1 else 0.0,
    }
    return {name: value for name, value in seen.items() if 0 < value < math.inf}
