"""Which figures of devices stand in status, and when they are written. Pure.

etcd is no metrics store: a figure that has changed a little is not worth a write that every watcher of the object sees,
and one that changes all the time is worth one only now and then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

CHANGE = 0.2
"""A figure is written when it differs by at least this part of the one that is shown."""
EVERY_S = 30.0
"""Shortest time between two such writes to one HatDeployment, as the API server sees them."""
CONTACT_EVERY_S = 600.0
"""The last contact is written with other figures, and by itself when the one that is shown is so much older."""
NAMES = ("chunkSize", "uplinkMbps", "rttMs", "acceptance")
CONTACT = "lastContact"

Figures = Mapping[str, Any]
"""Of one device: some of NAMES, in the units of status.devices, and CONTACT as the API writes times."""
Row = Mapping[str, Any]


def from_report(report: Mapping[str, Any]) -> dict[str, float]:
    """A row of /v1/devices in the units and with the digits of status; what is no such figure is left out."""
    found: dict[str, float] = {}
    chunk, uplink, rtt, acceptance = (
        _number(report.get(name)) for name in ("chunk_tokens", "uplink_bytes_per_s", "rtt_s", "acceptance")
    )
    if chunk is not None and 1 <= chunk < 2**31:
        found["chunkSize"] = int(chunk)
    if uplink is not None and uplink > 0:
        found["uplinkMbps"] = float(f"{uplink * 8e-6:.3g}")
    if rtt is not None and rtt > 0:
        found["rttMs"] = float(f"{rtt * 1e3:.3g}")
    if acceptance is not None and 0 <= acceptance <= 1:
        found["acceptance"] = round(acceptance, 2)
    return found


def of_row(row: Row) -> dict[str, Any]:
    """The figures in a row of status.devices."""
    return {name: row[name] for name in (*NAMES, CONTACT) if name in row}


def differ(shown: Figures, seen: Figures) -> bool:
    """Whether the figures of a device are worth a write."""
    if shown.keys() - {CONTACT} != seen.keys() - {CONTACT}:
        return True
    return _later_s(shown, seen) >= CONTACT_EVERY_S or any(
        seen[name] != value and abs(seen[name] - value) >= CHANGE * abs(value)
        for name, value in shown.items()
        if name != CONTACT
    )


class Pace:
    """Lets the figures of a HatDeployment change at most once in `every_s` seconds.

    It counts from the first look at a HatDeployment, so that a process that takes over does not write at once what its
    predecessor has just written. A write that fails counts too: it may have reached the API all the same.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._since: dict[tuple[str, str], float] = {}
        self._writing: set[tuple[str, str]] = set()

    def rows(
        self, key: tuple[str, str], rows: Sequence[Row], seen: Mapping[str, Figures], now: float
    ) -> tuple[list[dict[str, Any]], float | None]:
        """The rows to write.

        Args:
            key: namespace and name of the HatDeployment.
            rows: rows of status.devices, with the figures that are shown now.
            seen: the newest figures by device; devices that nobody has heard of lately keep theirs.
            now: monotonic seconds.

        Returns:
            The rows, and the seconds after which to ask again (None: nothing is held back). All figures are brought up
            to date in a write that one of them is worth: they cost nothing more.
        """
        since = self._since.setdefault(key, now)
        if not any(row["name"] in seen and differ(of_row(row), seen[row["name"]]) for row in rows):
            return [dict(row) for row in rows], None
        left = self._every_s - (now - since)
        if left > 0:
            return [dict(row) for row in rows], left
        self._since[key] = now
        self._writing.add(key)
        return [_with(row, seen.get(row["name"])) for row in rows], None

    def written(self, key: tuple[str, str], now: float) -> None:
        """A write has ended: if it held figures, the time counts from now on, however late the write was."""
        if key in self._writing:
            self._writing.remove(key)
            self._since[key] = now

    def forget(self, key: tuple[str, str]) -> None:
        """The HatDeployment is gone."""
        self._since.pop(key, None)
        self._writing.discard(key)


def _with(row: Row, seen: Figures | None) -> dict[str, Any]:
    if seen is None:
        return dict(row)
    return {**{name: value for name, value in row.items() if name not in (*NAMES, CONTACT)}, **seen}


def _later_s(shown: Figures, seen: Figures) -> float:
    """Seconds from the contact that is shown to the one that was seen; 0 without both."""
    if CONTACT not in shown or CONTACT not in seen:
        return 0.0
    return (datetime.fromisoformat(seen[CONTACT]) - datetime.fromisoformat(shown[CONTACT])).total_seconds()


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
